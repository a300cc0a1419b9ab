package interop

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// buildDir is where the program is built; it goes when the tests have ended.
var buildDir string

func TestMain(m *testing.M) {
	var err error
	if buildDir, err = os.MkdirTemp("", "xapi-nbd-interop-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(buildDir)
	os.Exit(code)
}

// program builds the real program, once and as `make build` does, and returns
// its path.
var program = sync.OnceValues(func() (string, error) {
	if err := lookAtSources(); err != nil {
		return "", err
	}
	path := filepath.Join(buildDir, "xapi-nbd")
	cmd := exec.Command("go", "build", "-trimpath", "-o", path, "xapi-nbd/cmd/xapi-nbd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building xapi-nbd: %w\n%s", err, out)
	}
	return path, nil
})

// lookAtSources reads the project's folders. go test remembers what a test has
// opened, and runs it again when that has changed; of what the build reads it
// knows nothing, and would go on telling the result of an older program.
func lookAtSources() error {
	const root = "../.."
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && path != root && strings.HasPrefix(d.Name(), ".") {
			return fs.SkipDir
		}
		return err
	})
}
