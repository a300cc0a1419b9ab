package interop

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// npmPackage is a pinned package of the npm registry, and a script of testdata that uses it.
type npmPackage struct {
	name, version string
	// needs are the packages that the script needs of it. The others, for other purposes,
	// are not installed.
	needs  []string
	script string
}

// install installs the package into the user's cache, once per version, and returns the
// folder, which also holds the script. A folder that exists is used as it is. Without
// INTEROP_XO=1 the test is skipped. It is also skipped if the registry fails, even with
// STRICT=1.
func (p npmPackage) install(t *testing.T) (dir string) {
	t.Helper()
	requireNode(t)
	dir, err := p.tryInstall(t)
	if err != nil {
		t.Skip(err)
	}
	return dir
}

// requireNode skips the test if packages of npm are not wanted or cannot be run.
func requireNode(t *testing.T) {
	t.Helper()
	if os.Getenv("INTEROP_XO") != "1" {
		t.Skip("INTEROP_XO=1 is not set: it installs packages from the npm registry")
	}
	for _, program := range []string{"node", "npm"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s, which is not installed", program)
		}
	}
}

// tryInstall is install that returns the error of the registry.
func (p npmPackage) tryInstall(t *testing.T) (dir string, err error) {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no folder for the packages: %w", err)
	}
	parent := filepath.Join(cache, "xapi-nbd-interop")
	if err := os.MkdirAll(parent, 0o755); err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(parent, strings.NewReplacer("@", "_", "/", "_").Replace(p.name+"@"+p.version))
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		fresh, err := os.MkdirTemp(parent, "new")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(fresh)
		if err := p.download(t, fresh); err != nil {
			return "", err
		}
		if err := os.Rename(fresh, dir); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("peer: %s %s", p.name, p.version)
	p.addScript(t, dir)
	return dir, nil
}

// addScript writes the script into the folder.
func (p npmPackage) addScript(t *testing.T, dir string) {
	t.Helper()
	script, err := os.ReadFile(filepath.Join("testdata", p.script))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, p.script), script, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// download installs the packages into a folder. The package itself is unpacked, so that npm
// does not ask for all that it depends on.
func (p npmPackage) download(t *testing.T, dir string) error {
	t.Helper()
	if err := p.npm(t, dir, "pack", p.name+"@"+p.version); err != nil {
		return err
	}
	if err := p.npm(t, dir, append([]string{"install", "--prefix", dir, "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"}, p.needs...)...); err != nil {
		return err
	}
	packed, err := filepath.Glob(filepath.Join(dir, "*.tgz"))
	if err != nil || len(packed) != 1 {
		t.Fatalf("npm pack left %q (%v), want one file", packed, err)
	}
	to := filepath.Join(dir, "node_modules", filepath.FromSlash(p.name))
	if err := os.MkdirAll(to, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "tar", "-xzf", packed[0], "-C", to, "--strip-components=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("unpacking %s: %v\n%s", p.name, err, out)
	}
	return nil
}

var npmError = regexp.MustCompile(`npm (?:error|ERR!) code (\S+)`)

// npm runs npm. The error has only npm's error code, because the rest of its output names the
// registry.
func (p npmPackage) npm(t *testing.T, dir string, args ...string) error {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "npm", args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		code := "without a code"
		if found := npmError.FindSubmatch(out); found != nil {
			code = string(found[1])
		}
		return fmt.Errorf("npm cannot deliver %s %s (npm %s: %w, %s)", p.name, p.version, args[0], err, code)
	}
	return nil
}
