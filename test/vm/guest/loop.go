package guest

import (
	"context"
	"errors"
	"path/filepath"
	"strconv"
)

// attachLoop puts a loop device under a file and returns its node.
func attachLoop(ctx context.Context, image string, readOnly bool, sectorSize int) (node string, err error) {
	args := []string{"--find", "--show", "--sector-size", strconv.Itoa(sectorSize)}
	if readOnly {
		args = append(args, "--read-only")
	}
	return run(ctx, "losetup", append(args, image)...)
}

// detachLoop detaches a loop device and waits until no process has it open.
// It may be repeated.
func detachLoop(ctx context.Context, node string) error {
	backing := filepath.Join("/sys/block", filepath.Base(node), "loop", "backing_file")
	if !exists(backing) {
		return nil
	}
	_, err := run(ctx, "losetup", "--detach", node)
	return errors.Join(err, waitGone(ctx, backing))
}
