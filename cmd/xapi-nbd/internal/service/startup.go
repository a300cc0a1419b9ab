package service

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

// startupGrace is how long after the start clients wait for the first response of xapi
// before they are refused. xapi responds within milliseconds if it runs, and the connection
// with which systemd starts the service, through xapi-nbd.socket, is always earlier.
const startupGrace = time.Second

// firstResponse lets clients wait for the first response of xapi since the start.
type firstResponse struct {
	latch            // open when xapi has responded
	until  time.Time // when clients stop waiting for it
	locked latch     // open when the state folder is locked, which happens before
}

// missing returns the refusal of clients before the first response.
func (f firstResponse) missing() error {
	if f.locked.isOpen() {
		return errNotYet
	}
	return errNotLocked
}

// wait waits for the first response until f.until, and reports whether there was one.
func (f firstResponse) wait(ctx context.Context) bool {
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

// unusableState are errors of the state folder after which no later attempt can succeed.
var unusableState = []syscall.Errno{
	syscall.ENOTDIR, syscall.EISDIR, syscall.EACCES, syscall.EPERM, syscall.ELOOP, syscall.ENAMETOOLONG, syscall.EINVAL,
}

// lockState makes one attempt to lock the state folder. The error matches ErrStateFolder if
// no later attempt can succeed. A later one can if another process holds the lock (a
// clean-up, or a service that is ending or hangs) or the file system is full.
func lockState(disks *vdi.Manager, dir string) error {
	err := disks.Lock()
	switch {
	case errors.Is(err, vdi.ErrLocked):
		if pid := proc.LockHolder(vdi.LockPath(dir)); pid != 0 {
			return fmt.Errorf("%w, process %d (%s)", err, pid, proc.Name(pid))
		}
		return err
	case slices.ContainsFunc(unusableState, func(errno syscall.Errno) bool { return errors.Is(err, errno) }):
		return &kindError{ErrStateFolder, err}
	}
	return err
}

// begin locks the state folder, if New could not, and then waits for the first response of
// xapi, after which clients are served.
func (s *Service) begin(ctx context.Context, background *sync.WaitGroup) error {
	if !s.locked.isOpen() {
		dir := s.settings.Load().StateDir
		try := func(context.Context) error { return lockState(s.disks, dir) }
		if err := s.retries.again(ctx, "lock the state folder", s.lockError, try); err != nil {
			return err
		}
		s.locked.open()
		_ = s.startControl(ctx, background) // it is tried again, and in the log
	}
	return s.meetXapi(ctx)
}
