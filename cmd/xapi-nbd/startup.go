package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/proc"
	"xapi-nbd/vdi"
)

// startupGrace is how long after the start a client waits for xapi's first answer
// before it is refused. xapi answers within milliseconds if it is there at all, and
// the connection with which systemd starts the service, through xapi-nbd.socket, is
// always earlier.
const startupGrace = time.Second

// firstAnswer is xapi's.
type firstAnswer struct {
	latch            // open when it has come
	until  time.Time // clients wait for it
	locked latch     // open when the state folder is ours, which comes before
}

// missing is what clients read as long as the answer has not come.
func (f firstAnswer) missing() error {
	if f.locked.isOpen() {
		return errNotYet
	}
	return errNotLocked
}

// came waits for the answer, within the grace, and reports whether it has come.
func (f firstAnswer) came(ctx context.Context) bool {
	if f.isOpen() {
		return true
	}
	ctx, cancel := context.WithDeadline(ctx, f.until)
	defer cancel()
	select {
	case <-f.latch:
		return true
	case <-ctx.Done():
		return f.isOpen()
	}
}

// unusableState are the errors of a state folder that waiting does not mend.
var unusableState = []syscall.Errno{
	syscall.ENOTDIR, syscall.EISDIR, syscall.EACCES, syscall.EPERM, syscall.ELOOP, syscall.ENAMETOOLONG, syscall.EINVAL,
}

// lockState makes one attempt to get the state folder. The error is an exitError
// if no later attempt can succeed. A lock that another process holds is that of a
// clean-up, or of a service that is ending or hangs, and a full file system gets
// space again.
func lockState(disks *vdi.Manager, dir string) error {
	err := disks.Lock()
	switch {
	case errors.Is(err, vdi.ErrLocked):
		if pid := proc.LockHolder(vdi.LockPath(dir)); pid != 0 {
			return fmt.Errorf("%w, process %d (%s)", err, pid, proc.Name(pid))
		}
		return err
	case slices.ContainsFunc(unusableState, func(errno syscall.Errno) bool { return errors.Is(err, errno) }):
		return usageError(err)
	}
	return err
}

// begin gets the state folder, if newService could not, and then waits for xapi's
// first answer: after that clients are served.
func (s *service) begin(ctx context.Context, background *sync.WaitGroup) error {
	if !s.locked.isOpen() {
		dir := s.settings.Load().StateDir
		try := func(context.Context) error { return lockState(s.disks, dir) }
		if err := s.retries.again(ctx, "lock the state folder", s.lockError, try); err != nil {
			return err
		}
		s.locked.open()
		s.startControl(ctx, background)
	}
	return s.meetXapi(ctx)
}
