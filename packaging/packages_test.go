package packaging

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"xapi-nbd/test/requires"
)

// installed are the files of both packages, without documentation and without the completion
// scripts whose folders differ between distributions.
var installed = []string{
	"etc/xapi-nbd.toml",
	"usr/bin/nbd-tool",
	"usr/sbin/xapi-nbd",
	"usr/sbin/xapi-nbd-firewall",
	"usr/lib/systemd/system/xapi-nbd.path",
	"usr/lib/systemd/system/xapi-nbd.service",
	"usr/lib/systemd/system/xapi-nbd.socket",
	"usr/share/bash-completion/completions/nbd-tool",
	"usr/share/bash-completion/completions/xapi-nbd",
	"usr/share/doc/xapi-nbd/OPERATIONS.md",
	"usr/share/doc/xapi-nbd/README.md",
	"usr/share/doc/xapi-nbd/REFERENCE.md",
	"usr/share/doc/xapi-nbd/examples/nbdcopy.md",
	"usr/share/doc/xapi-nbd/results/INTEROP.md",
	"usr/share/doc/xapi-nbd/grafana/xapi-nbd.json",
	"usr/share/doc/xapi-nbd/prometheus/xapi-nbd.rules.yml",
	"usr/share/doc/xapi-nbd/copyright",
	"usr/share/doc/xapi-nbd/write.conf",
	"usr/share/fish/vendor_completions.d/nbd-tool.fish",
	"usr/share/fish/vendor_completions.d/xapi-nbd.fish",
	"usr/share/man/man1/nbd-tool.1.gz",
	"usr/share/man/man5/xapi-nbd.toml.5.gz",
	"usr/share/man/man8/xapi-nbd.8.gz",
	"usr/share/man/man8/xapi-nbd-firewall.8.gz",
}

// The drop-ins for newer and for older systemds.
const (
	newDropIn = "usr/lib/systemd/system/xapi-nbd.service.d/hardening.conf"
	oldDropIn = "usr/lib/systemd/system/xapi-nbd.service.d/memory.conf"
)

func version(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../VERSION")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

// The version stands in one file; the spec has to repeat it, for those who build
// from the source package alone.
func TestSpecHasTheVersion(t *testing.T) {
	spec, err := os.ReadFile("xapi-nbd.spec")
	if err != nil {
		t.Fatal(err)
	}
	if want := "Version:        " + version(t) + "\n"; !strings.Contains(string(spec), want) {
		t.Errorf("xapi-nbd.spec lacks %q", want)
	}
}

// build runs one of the scripts and returns the paths that it prints.
func build(t *testing.T, script, dir string) []string {
	t.Helper()
	return strings.Fields(mustRun(t, append(os.Environ(), "SOURCE_DATE_EPOCH="), script, dir))
}

// same fails unless the files are equal, byte for byte.
func same(t *testing.T, a, b string) {
	t.Helper()
	x, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(x, y) {
		t.Errorf("%s and %s differ (%d and %d bytes)", a, b, len(x), len(y))
	}
}

// filesBelow lists files and links, sorted, relative to dir.
func filesBelow(t *testing.T, dir string) []string {
	t.Helper()
	var files []string
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			path, err = filepath.Rel(dir, path)
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(files)
	return files
}

func checkInstalled(t *testing.T, files []string) {
	t.Helper()
	for _, want := range installed {
		if !slices.Contains(files, want) {
			t.Errorf("the package lacks /%s", want)
		}
	}
}

// needNfpm ends the test where the pinned nfpm is neither in the module cache nor
// to be had.
func needNfpm(t *testing.T) {
	t.Helper()
	script, err := os.ReadFile("build-deb.sh")
	if err != nil {
		t.Fatal(err)
	}
	module := regexp.MustCompile(`(?m)^nfpm=(\S+)$`).FindSubmatch(script)
	if module == nil {
		t.Fatal("build-deb.sh does not say which nfpm")
	}
	r := runIn(t, os.Environ(), "go", "run", string(module[1]), "--version")
	switch {
	case r.code == 0:
	case os.Getenv("STRICT") == "1":
		t.Fatalf("needs %s, and STRICT=1 allows no skip: %s", module[1], r.stderr)
	default:
		t.Skipf("needs %s: %s", module[1], r.stderr)
	}
}

// TestDeb: the content of the Debian package, and that it can be installed, used, removed,
// installed again and purged, in a root folder of its own.
func TestDeb(t *testing.T) {
	dpkg, dpkgDeb := requires.Tool(t, "dpkg"), requires.Tool(t, "dpkg-deb")
	systemctl := requires.Tool(t, "systemctl")
	needNfpm(t)
	watchSources(t)
	script := filepath.Join(snapshot(t), "build-deb.sh")
	debs, again := build(t, script, t.TempDir()), build(t, script, t.TempDir())
	if len(debs) != 1 || len(again) != 1 {
		t.Fatalf("got %q and %q, want one package each", debs, again)
	}
	deb := debs[0]
	same(t, deb, again[0])

	content := filepath.Join(t.TempDir(), "content")
	mustRun(t, os.Environ(), dpkgDeb, "-x", deb, content)
	files := filesBelow(t, content)
	checkInstalled(t, files)
	checkManPages(t, content)
	for _, want := range []string{newDropIn, "usr/share/zsh/vendor-completions/_xapi-nbd"} {
		if !slices.Contains(files, want) {
			t.Errorf("the package lacks /%s", want)
		}
	}
	if slices.Contains(files, oldDropIn) {
		t.Errorf("the package has /%s, of which its systemd warns", oldDropIn)
	}
	for line := range strings.Lines(mustRun(t, os.Environ(), dpkgDeb, "--contents", deb)) {
		if f := strings.Fields(line); f[1] != "root/root" || strings.HasPrefix(f[0], "-") && f[0][8] == 'w' {
			t.Errorf("owner or mode: %s", line)
		}
	}
	info := mustRun(t, os.Environ(), dpkgDeb, "--field", deb, "Package", "Version", "Architecture")
	if !strings.Contains(info, "Package: xapi-nbd\n") || !strings.Contains(info, "Version: "+version(t)+"-1\n") {
		t.Errorf("got %s", info)
	}
	control := t.TempDir()
	mustRun(t, os.Environ(), dpkgDeb, "--control", deb, control)
	if got, err := os.ReadFile(filepath.Join(control, "conffiles")); err != nil || string(got) != "/etc/xapi-nbd.toml\n" {
		t.Errorf("got conffiles %q (%v), want /etc/xapi-nbd.toml", got, err)
	}

	t.Run("lintian", func(t *testing.T) { lint(t, deb) })
	t.Run("life", func(t *testing.T) {
		requires.Root(t)
		root := dpkgRoot(t)
		life := func(args ...string) {
			t.Helper()
			mustRun(t, append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin"), dpkg,
				append([]string{"--root=" + root, "--force-script-chrootless", "--log=/dev/null"}, args...)...)
		}
		enabled := func() string {
			return strings.TrimSpace(runIn(t, os.Environ(), systemctl, "--root="+root, "is-enabled", "xapi-nbd.path").stdout)
		}
		life("--install", deb)
		if got := enabled(); got != "enabled" {
			t.Errorf("installed: xapi-nbd.path is %q, want enabled", got)
		}
		got := mustRun(t, os.Environ(), filepath.Join(root, "usr/sbin/xapi-nbd"), "version")
		if want := "xapi-nbd " + version(t) + "\n"; got != want {
			t.Errorf("the installed program says %q, want %q", got, want)
		}
		mustRun(t, os.Environ(), filepath.Join(root, "usr/sbin/xapi-nbd"), "demo", "--once")

		life("--remove", "xapi-nbd")
		if diff := cmp.Diff([]string{"etc/xapi-nbd.toml"}, withoutDpkg(filesBelow(t, root))); diff != "" {
			t.Errorf("removed: want -, left behind +\n%s", diff)
		}
		life("--install", deb)
		if got := enabled(); got != "enabled" {
			t.Errorf("back again: xapi-nbd.path is %q, want enabled", got)
		}
		life("--purge", "xapi-nbd")
		if left := withoutDpkg(filesBelow(t, root)); left != nil {
			t.Errorf("purged: left behind %q", left)
		}
	})
}

// dpkgRoot is an empty system, as far as dpkg is concerned.
func dpkgRoot(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for _, dir := range []string{"info", "updates", "triggers"} {
		if err := os.MkdirAll(filepath.Join(root, "var/lib/dpkg", dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{"status", "available"} {
		if err := os.WriteFile(filepath.Join(root, "var/lib/dpkg", file), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// withoutDpkg leaves out dpkg's own files.
func withoutDpkg(files []string) []string {
	var rest []string
	for _, file := range files {
		if !strings.HasPrefix(file, "var/lib/dpkg/") {
			rest = append(rest, file)
		}
	}
	return rest
}

// The RPM, built as XenServer and XCP-ng do: from a source archive, without the
// network.
func TestRPM(t *testing.T) {
	rpm := requires.Tool(t, "rpm")
	requires.Tool(t, "rpmbuild")
	watchSources(t)
	script := filepath.Join(snapshot(t), "build-rpm.sh")
	dir, other := t.TempDir(), t.TempDir()
	rpms, again := build(t, script, dir), build(t, script, other)
	if len(rpms) != 2 || len(again) != 2 {
		t.Fatalf("got %q and %q, want a binary and a source package each", rpms, again)
	}
	for i := range rpms {
		same(t, rpms[i], again[i])
	}
	binary := rpms[slices.IndexFunc(rpms, func(path string) bool { return !strings.HasSuffix(path, ".src.rpm") })]

	query := func(args ...string) string {
		t.Helper()
		return mustRun(t, os.Environ(), rpm, append([]string{"-qp"}, append(args, binary)...)...)
	}
	listed := strings.Fields(query("--list"))
	for i, path := range listed {
		listed[i] = strings.TrimPrefix(path, "/")
	}
	checkInstalled(t, listed)
	if slices.Contains(listed, newDropIn) || !slices.Contains(listed, oldDropIn) {
		t.Errorf("the package has not the drop-in for systemd 219, or one of which that warns")
	}
	if got, want := query("--queryformat", "%{NAME} %{EPOCH} %{VERSION}"), "xapi-nbd 1 "+version(t); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got := strings.TrimSpace(query("--configfiles")); got != "/etc/xapi-nbd.toml" {
		t.Errorf("got configuration files %q", got)
	}
	if got := query("--requires"); regexp.MustCompile(`(?m)^lib`).MatchString(got) {
		t.Errorf("the programs are not static:\n%s", got)
	}
	scripts := query("--scripts")
	for _, name := range []string{"postinstall", "preremove", "postremove"} {
		text, err := os.ReadFile("scripts/" + name + ".sh")
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(scripts, strings.TrimSpace(string(text))) {
			t.Errorf("the package's scripts lack %s.sh, or it was changed:\n%s", name, scripts)
		}
	}

	content := unpackRPM(t, binary)
	built := stageOf(t, rpms[slices.IndexFunc(rpms, func(path string) bool { return strings.HasSuffix(path, ".src.rpm") })])
	files := filesBelow(t, built)
	if diff := cmp.Diff(files, filesBelow(t, content)); diff != "" {
		t.Errorf("built -, in the package +\n%s", diff)
	}
	for _, file := range files {
		same(t, filepath.Join(built, file), filepath.Join(content, file))
	}
}

// unpackRPM returns a folder with the files of a package.
func unpackRPM(t *testing.T, rpm string) string {
	t.Helper()
	content := t.TempDir()
	archive, err := exec.Command(requires.Tool(t, "rpm2cpio"), rpm).Output()
	if err != nil {
		t.Fatalf("rpm2cpio: %v", err)
	}
	unpack := exec.Command(requires.Tool(t, "cpio"), "--extract", "--make-directories", "--quiet", "--no-absolute-filenames")
	unpack.Dir, unpack.Stdin = content, bytes.NewReader(archive)
	if out, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v\n%s", err, out)
	}
	return content
}

// stageOf unpacks the files of a package from its source package.
func stageOf(t *testing.T, srpm string) string {
	t.Helper()
	sources, stage := t.TempDir(), t.TempDir()
	name := "xapi-nbd-" + version(t)
	mustRun(t, os.Environ(), "tar", "-xzf", filepath.Join(unpackRPM(t, srpm), name+".tar.gz"), "-C", sources)
	env := append(os.Environ(), "GOFLAGS=-mod=vendor", "GOPROXY=off", "GOTOOLCHAIN=local", "SOURCE_DATE_EPOCH=")
	mustRun(t, env, filepath.Join(sources, name, "packaging/stage.sh"), stage)
	source, err := os.Stat(filepath.Join(sources, name, "VERSION"))
	if err != nil {
		t.Fatal(err)
	}
	built, err := os.Stat(filepath.Join(stage, "usr/sbin/xapi-nbd"))
	if err != nil {
		t.Fatal(err)
	}
	if !built.ModTime().Equal(source.ModTime()) {
		t.Errorf("the installed files are of %v, their sources of %v", built.ModTime(), source.ModTime())
	}
	return stage
}

// install.sh changes neither folders nor settings that are there.
func TestInstall(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the programs, which takes 15 s")
	}
	dest := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dest, "etc"), 0o750); err != nil {
		t.Fatal(err)
	}
	settings := filepath.Join(dest, "etc/xapi-nbd.toml")
	if err := os.WriteFile(settings, []byte("port = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	watchSources(t)
	build(t, "./install.sh", dest)
	checkInstalled(t, filesBelow(t, dest))
	if text, err := os.ReadFile(settings); err != nil || string(text) != "port = 1\n" {
		t.Errorf("the settings became %q (%v)", text, err)
	}
	if folder, err := os.Stat(filepath.Join(dest, "etc")); err != nil || folder.Mode().Perm() != 0o750 {
		t.Errorf("the folder became %v (%v)", folder.Mode(), err)
	}
	if r := runIn(t, os.Environ(), "./stage.sh", dest); r.code != 2 || !strings.Contains(r.stderr, "not empty") {
		t.Errorf("stage.sh into a folder with files: got exit code %d and %q", r.code, r.stderr)
	}
}

// The time that packages carry comes from the environment, else from the sources.
func TestEpoch(t *testing.T) {
	env := append(os.Environ(), "SOURCE_DATE_EPOCH=1234567890")
	if got := mustRun(t, env, "./epoch.sh"); got != "1234567890\n" {
		t.Errorf("got %q, want the date of SOURCE_DATE_EPOCH", got)
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "packaging"), 0o755); err != nil {
		t.Fatal(err)
	}
	mustRun(t, os.Environ(), "cp", "epoch.sh", filepath.Join(dir, "packaging"))
	mustRun(t, os.Environ(), "touch", "-d", "@987654321", filepath.Join(dir, "VERSION"))
	if got := mustRun(t, append(os.Environ(), "SOURCE_DATE_EPOCH="), filepath.Join(dir, "packaging/epoch.sh")); got != "987654321\n" {
		t.Errorf("got %q, want the time of VERSION", got)
	}
}
