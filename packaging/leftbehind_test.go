package packaging

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"xapi-nbd/test/requires"
)

// A build leaves its packages behind and nothing else, and nothing at all when a
// program that it runs fails or when it is interrupted, whichever program it is.
func TestBuildsLeaveNothingBehind(t *testing.T) {
	watchSources(t)
	here := snapshot(t)
	tree := filepath.Dir(here)
	git := requires.Tool(t, "git")
	mustRun(t, os.Environ(), git, "-C", tree, "add", "-A")
	mustRun(t, os.Environ(), git, "-C", tree, "-c", "user.name=test", "-c", "user.email=test@example.invalid", "commit", "-q", "-m", "all")
	goFake, err := filepath.Abs("testdata/go")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ script, tool, dir, packages string }{
		{"build-deb.sh", "gzip", "bin", `^xapi-nbd_\S+\.deb$`},
		{"build-rpm.sh", "rpmbuild", "bin/rpm", `^rpm/RPMS/\w+/xapi-nbd-\S+\.rpm rpm/SRPMS/xapi-nbd-\S+\.src\.rpm$`},
	} {
		t.Run(tt.script, func(t *testing.T) {
			requires.Tool(t, tt.tool)
			for _, how := range []string{"fail", "TERM"} {
				for at, done := 1, false; !done; at++ {
					tmp, know := t.TempDir(), t.TempDir()
					env := append(os.Environ(), "GO="+goFake, "TMPDIR="+tmp, "FAKE="+know, "FAIL_BY="+how,
						"FAIL_AT="+strconv.Itoa(at), "SOURCE_DATE_EPOCH=")
					r := runIn(t, env, filepath.Join(here, tt.script), filepath.Join(tree, tt.dir))
					done = r.code == 0
					if left := filesBelow(t, tmp); len(left) > 0 {
						t.Errorf("%s in call %d of go: left in TMPDIR: %q", how, at, left)
					}
					status := mustRun(t, os.Environ(), git, "-C", tree, "status", "--porcelain", "--ignored")
					switch {
					case !done && status != "":
						t.Errorf("%s in call %d of go: left behind: %s", how, at, status)
					case done && (status != "!! bin/\n" || at < 4):
						t.Errorf("done after %d calls of go, want at least 4: left behind: %s%s", at, status, r.stderr)
					case done:
						got := strings.Join(filesBelow(t, filepath.Join(tree, "bin")), " ")
						if !regexp.MustCompile(tt.packages).MatchString(got) {
							t.Errorf("got the files %s, want %s", got, tt.packages)
						}
					}
					if t.Failed() {
						return
					}
				}
				if err := os.RemoveAll(filepath.Join(tree, "bin")); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// lint runs lintian on the Debian package. Accepted tags are in debian/lintian-overrides, with
// the reason.
func lint(t *testing.T, deb string) {
	t.Helper()
	lintian := requires.Tool(t, "lintian")
	args := []string{"--fail-on", "error,warning", "--tag-display-limit", "0", deb}
	if os.Geteuid() == 0 {
		args = slices.Insert(args, 0, "--allow-root")
	}
	if r := runIn(t, os.Environ(), lintian, args...); r.code != 0 {
		t.Errorf("lintian: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
}
