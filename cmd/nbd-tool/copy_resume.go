package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"xapi-nbd/cmd/nbd-tool/internal/copying"
)

// begin opens the destination, for a new copy or for the rest of an interrupted one.
func (j *copyJob) begin(ctx context.Context) (err error) {
	j.before = j.src.Size()
	if j.changes != nil && j.to.nbd == nil {
		j.before = lengthOf(j.to.path, j.src.Size())
	}
	var old *copying.State
	if j.o.resume != "" {
		if old, err = j.loadState(); err != nil {
			return err
		}
	}
	resumed := old != nil
	if resumed {
		j.before = old.Before
	} else {
		defer func() {
			if err == nil {
				return
			}
			if j.state != nil { // nothing was copied
				err = errors.Join(err, copying.RemoveState(j.o.resume))
			}
			err = errors.Join(err, j.shorten())
		}()
	}
	if j.changes != nil {
		j.changes.CopyFrom(j.before)
	}
	if err := j.openDestination(ctx, resumed); err != nil {
		return err
	}
	if j.state == nil {
		return nil
	}
	if err := j.recordDestination(ctx, old); err != nil {
		return errors.Join(err, j.dst.Close())
	}
	return nil
}

// shorten gives the destination file of an increment the size that it had before, so that the
// same command copies the end again.
func (j *copyJob) shorten() error {
	if j.before == j.src.Size() || lengthOf(j.to.path, j.src.Size()) <= j.before {
		return nil
	}
	return os.Truncate(j.to.path, j.before)
}

// loadState sets j.state, and returns the state of an interrupted copy, or nil if there is
// none. It writes the file before the destination is changed: if it cannot be written,
// nothing has happened yet.
func (j *copyJob) loadState() (*copying.State, error) {
	source, err := identify(j.from, j.src, true)
	if err != nil {
		return nil, err
	}
	old, err := copying.LoadState(j.o.resume)
	switch {
	case err != nil:
		return nil, err
	case old != nil && old.Destination == (copying.Ident{}):
		// That process may have ended right after it had made the destination longer.
		j.before, old = min(j.before, old.Before), nil
	}
	j.state = &copying.State{Source: source, Part: j.what, Before: j.before}
	if old == nil {
		return nil, j.state.Save(j.o.resume)
	}
	return old, nil
}

// recordDestination completes the state. For an interrupted copy it checks that this is its
// continuation, and goes on where that one was.
func (j *copyJob) recordDestination(ctx context.Context, old *copying.State) (err error) {
	if j.state.Destination, err = identify(j.to, j.dst, false); err != nil {
		return err
	}
	j.state.Before = j.before
	if old == nil {
		return j.state.Save(j.o.resume)
	}
	if err := old.Check(j.state); err != nil {
		again := "remove the file to begin anew"
		if old.Before < j.src.Size() { // without the file its old size is forgotten
			again = "remove the file and copy everything, without increments, to begin anew"
		}
		return fmt.Errorf("%s: %w; %s", j.o.resume, err, again)
	}
	j.state.Done = old.Done
	if j.changes != nil || !isRegular(j.to.path) {
		return nil
	}
	// Data that was written behind the last flush may be of an older state of the source. So
	// begin with an empty rest.
	j.blank = true
	return j.dst.Zero(ctx, old.Done, j.src.Size()-old.Done)
}

func isRegular(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}

// identify returns the identity of an end, for a file with its time of modification if
// modified is true. It has no secrets in it.
func identify(s side, e copying.End, modified bool) (copying.Ident, error) {
	id := copying.Ident{Size: e.Size()}
	if export, ok := e.(*copying.Export); ok {
		id.Name = s.uri.Server() + " export "
		if vdi := vdiOf(s.uri.Export); vdi != "" {
			id.Name += vdi
		} else {
			id.Name += fmt.Sprintf("%q described as %q", redact([]byte(s.uri.Export)), export.Pool().Info().Description)
		}
		return id, nil
	}
	path, err := filepath.Abs(s.path)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return id, err
	}
	st, err := os.Stat(path)
	if err != nil {
		return id, err
	}
	id.Name = path
	if !st.Mode().IsRegular() {
		if disk := diskOf(st.Sys().(*syscall.Stat_t).Rdev); disk != "" {
			id.Name = disk
		}
	} else {
		id.Name += fmt.Sprintf(" inode %d", st.Sys().(*syscall.Stat_t).Ino)
		if modified {
			id.Name += " modified " + st.ModTime().UTC().Format("2006-01-02T15:04:05.999999999Z")
		}
	}
	return id, nil
}
