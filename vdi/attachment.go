package vdi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"xapi-nbd/vdi/blockdev"
	"xapi-nbd/xapi"
)

// attachment is one VBD and its open device. One goroutine, run, creates the VBD, serves
// the device and removes the VBD.
type attachment struct {
	m     *Manager
	log   *slog.Logger
	vdi   string // uuid
	since time.Time
	nonce string   // in the VBD's tag: identifies the VBD when its ref is not known
	bases []string // uuids of the VDIs to which the clients compare this one

	// writer is the session whose connections write the VDI; "" if it is only read.
	writer  xapi.SessionRef
	guard   *guard       // makes writes wait
	written atomic.Int64 // bytes that were written or zeroed

	ready chan struct{} // closed when attach has succeeded or failed
	wake  chan struct{} // holds one token when run must read stage again
	gone  chan struct{} // closed when detach has returned

	// lifetime ends when the device must not be read any more: it was taken away, or the
	// last user has closed its Disk. The cause is the reason.
	lifetime    context.Context
	endLifetime context.CancelCauseFunc

	// Guarded by m.mu.
	stage       stage
	users       int
	vbdUUID     string    // "" until known
	endingSince time.Time // when stage became lost or a later one; zero before
	leftOpen    bool      // the last user has to close the device

	vm vmName

	helpers sync.WaitGroup // findBlocks and keepGuarding

	// Written before ready is closed, constant afterwards.
	err         error
	dev         *blockdev.Device
	blocks      blocks
	description string
	nameLabel   string // of the VDI
	vdiRef      xapi.VDIRef
	virtualSize int64                          // of the VDI when the device was opened, in bytes
	notFrozen   string                         // why the content may change while attached, see checkFrozen; "" if it cannot
	changed     map[string]*xapi.ChangedBlocks // by base; has no entry for a base whose changed blocks are unknown

	// Used by run alone.
	vbd      xapi.VBDRef // "" until known
	mayExist bool        // xapi has created the VBD, or may have
	device   string      // VBD.device; "" until known
	created  time.Time   // when VBD.create was called
	epoch    xapi.Epoch  // of the local session, before created
	recorded bool        // there may be entries in the state folder
}

// newAttachment returns an attachment with one user. The caller starts run.
func newAttachment(m *Manager, r request) *attachment {
	a := &attachment{
		m: m, vdi: r.vdi, since: time.Now(), nonce: newNonce(m.owner), bases: r.bases, writer: r.writer, users: 1,
		log:    m.log.With("vdi", r.vdi),
		guard:  newGuard(m.bootTime),
		blocks: blocks{done: make(chan struct{})},
		ready:  make(chan struct{}), wake: make(chan struct{}, 1), gone: make(chan struct{}),
	}
	a.lifetime, a.endLifetime = context.WithCancelCause(context.Background())
	return a
}

func (a *attachment) isWritable() bool { return a.writer != "" }

// run attaches, serves until the attachment is to be detached, and detaches. The contexts
// of the users do not cancel it: a plug in progress is completed, then used or undone.
func (a *attachment) run(s *xapi.Session) {
	err := a.attach(a.m.ctx, s)
	a.finishAttach(err)
	a.serve(a.m.ctx)
	a.endLifetime(errUnused)
	a.m.remove(a, a.detach(a.m.ctx))
}

// errUnused is the cause of the end of a lifetime after the last Disk was closed.
var errUnused = errors.New("the last connection has ended")

// finishAttach stores the result of attach, sets the next stage and closes ready.
func (a *attachment) finishAttach(err error) {
	a.m.mu.Lock()
	a.err = err
	if err != nil || a.users == 0 {
		a.moveTo(detaching)
	} else {
		a.moveTo(attached)
	}
	a.m.mu.Unlock()
	close(a.ready)
}

// checkEvery is the interval of the checks that the device is still the same. Reads check
// it too, but idle connections also have to end when it is taken away: while this process
// has the device open, the unplug of the other client has to wait.
const checkEvery = time.Second

// serve returns when the attachment is to be detached.
func (a *attachment) serve(ctx context.Context) {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		switch a.currentStage() {
		case lingering:
			a.linger(ctx)
			continue
		case detaching:
			return
		}
		select {
		case <-a.wake:
		case <-tick.C:
			if err := a.dev.Check(); err != nil {
				a.lose(err)
			}
		case <-ctx.Done():
			// Close has given up waiting for the users. Their reads fail from now
			// on; the journal keeps the VBD for the next process.
			a.abandon()
		}
	}
}

// isReady reports whether attach has succeeded or failed.
func (a *attachment) isReady() bool {
	select {
	case <-a.ready:
		return true
	default:
		return false
	}
}

func (a *attachment) currentStage() stage {
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	return a.stage
}

// poke makes run read the stage again.
func (a *attachment) poke() {
	select {
	case a.wake <- struct{}{}:
	default: // there is a token already
	}
}

// lose ends an attachment whose device was taken away: its connections end, and after the
// last one the VBD is removed. It does nothing for an attachment that is already ending.
func (a *attachment) lose(err error) {
	cause := err
	if !errors.Is(err, ErrLost) {
		cause = fmt.Errorf("%w: %w", ErrLost, err)
	}
	if a.endUse(cause) {
		a.log.Error("the device was taken away", "vbd", a.vbdUUID, "err", err)
	}
}

// endUse ends the lifetime of an attachment in use with the given cause. For an attachment
// that is already ending it does nothing and returns false.
func (a *attachment) endUse(cause error) bool {
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	switch a.stage {
	case attached:
		a.moveTo(lost)
	case lingering:
		a.moveTo(detaching) // there are no connections to end
	default:
		return false
	}
	a.endLifetime(cause)
	a.poke()
	return true
}

// abandon ends the attachment although users still have Disks of it.
func (a *attachment) abandon() {
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	a.endLifetime(ErrClosed)
	if a.stage == attached || a.stage == lost {
		a.moveTo(detaching)
	}
}
