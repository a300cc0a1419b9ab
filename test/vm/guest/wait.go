package guest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
)

const (
	// deviceLimit is for how long a device may take to come or to go. An
	// emulated machine is slow; nothing is expected to take so long.
	deviceLimit = time.Minute
	pollEvery   = 10 * time.Millisecond
)

// waitFor calls done until it returns true or an error, or ctx ends, or deviceLimit has
// passed. For most changes of the kernel there is no notice to wait for.
func waitFor(ctx context.Context, name string, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, deviceLimit)
	defer cancel()
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	for {
		if ok, err := done(); err != nil {
			return fmt.Errorf("waiting for %s: %w", name, err)
		} else if ok {
			return nil
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			if ok, err := done(); err == nil && ok { // nobody may have looked for a while
				return nil
			}
			return fmt.Errorf("waiting for %s: %w", name, context.Cause(ctx))
		}
	}
}

// waitGone waits until there is no file of that name.
func waitGone(ctx context.Context, path string) error {
	return waitFor(ctx, path+" to go", func() (bool, error) { return !exists(path), nil })
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// run runs a program and returns its output without the last newline.
func run(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	out = bytes.TrimSuffix(out, []byte("\n"))
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out), nil
}
