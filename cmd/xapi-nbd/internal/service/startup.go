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

// firstResponse is the first response of xapi since the start.
type firstResponse struct {
	latch            // open when xapi has responded
	until  time.Time // clients wait for it
	locked latch     // open when the state folder is locked, which comes before
}

// missing is the refusal of clients before the first response.
func (f firstResponse) missing() error {
	if f.locked.isOpen() {
		return errNotYet
	}
	return errNotLocked
}

// wait waits for the first response, within the grace, and reports whether there is one.
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

// unusableState are the errors of a state folder that waiting does not mend.
var unusableState = []syscall.Errno{
	syscall.ENOTDIR, syscall.EISDIR, syscall.EACCES, syscall.EPERM, syscall.ELOOP, syscall.ENAMETOOLONG, syscall.EINVAL,
}

// lockState makes one attempt to get the state folder. The error matches
// ErrStateFolder if no later attempt can succeed. A lock that another process holds is that of a
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
		return &kindError{ErrStateFolder, err}
	}
	return err
}

// begin locks the state folder, if newService could not, and then waits for the first
// response of xapi: after that clients are served.
func (s *Service) begin(ctx context.Context, background *sync.WaitGroup) error {
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
