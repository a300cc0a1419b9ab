package vdi

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"xapi-nbd/vdi/blockdev"
	"xapi-nbd/xapi"
)

// attachment is one VBD and the device behind it. One goroutine, run, takes it
// from create to forget.
type attachment struct {
	m     *Manager
	log   *slog.Logger
	vdi   string // uuid
	since time.Time
	nonce string   // in the VBD's tag: finds it when its ref was never heard of
	bases []string // uuids of VDIs since which the changed blocks are wanted

	ready chan struct{} // closed when attaching is over, either way
	wake  chan struct{} // holds one token when run should look at the stage
	gone  chan struct{} // closed when detaching is over

	// life ends with the device: when somebody took it away, or after the last
	// user. Its cause says why.
	life context.Context
	end  context.CancelCauseFunc

	// Guarded by m.mu.
	stage   stage
	users   int
	vbdUUID string // "" until known
	// endingSince is when it came to the stage lost or a later one; else zero.
	endingSince time.Time

	vm vmName

	// Written before ready is closed, constant afterwards.
	err         error
	dev         *blockdev.Device
	blocks      blocks
	description string
	nameLabel   string // of the VDI
	vdiRef      xapi.VDIRef
	virtualSize int64                          // of the VDI when the device was opened, in bytes
	notFrozen   string                         // why the content may change while it is attached, see checkFrozen; "" if it cannot
	changed     map[string]*xapi.ChangedBlocks // by base; what is not known is missing

	// Used by run alone.
	vbd      xapi.VBDRef // "" until known
	mayExist bool        // xapi was asked to create it
	device   string      // VBD.device; "" until known
	created  time.Time   // when xapi was asked to create it
	epoch    xapi.Epoch  // of the local session, before that
	recorded bool        // there may be entries in the state folder
}

// newAttachment returns one with its first user; run makes it real.
func newAttachment(m *Manager, vdiUUID string, bases []string) *attachment {
	a := &attachment{
		m: m, vdi: vdiUUID, since: time.Now(), nonce: rand.Text(), bases: bases, users: 1,
		log:    m.log.With("vdi", vdiUUID),
		blocks: blocks{done: make(chan struct{})},
		ready:  make(chan struct{}), wake: make(chan struct{}, 1), gone: make(chan struct{}),
	}
	a.life, a.end = context.WithCancelCause(context.Background())
	return a
}

// run is the whole life of an attachment. It does not hear the contexts of its
// users: a plug that was begun is completed and then used or undone.
func (a *attachment) run(s *xapi.Session) {
	err := a.attach(a.m.ctx, s)
	a.finishAttach(err)
	a.serve(a.m.ctx)
	a.end(errUnused)
	a.m.remove(a, a.detach(a.m.ctx))
}

// errUnused is why an attachment ended that nobody had a Disk of any more.
var errUnused = errors.New("the last connection has ended")

// finishAttach tells those who wait how it went.
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

// checkEvery is how often the device is looked at on behalf of connections that
// read nothing: they too must end when it is taken away, and an open descriptor
// of ours keeps whoever takes it waiting.
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
			// Given up with users that never left. What they read from now on
			// fails; the journal has the rest.
			a.abandon()
		}
	}
}

// isReady reports whether attaching is over, either way.
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

// poke makes run look at the stage.
func (a *attachment) poke() {
	select {
	case a.wake <- struct{}{}:
	default: // it is going to look anyway
	}
}

// lose ends an attachment whose device is not ours any more: its connections
// end, and when they have the rest is undone. What is already ending is left
// alone.
func (a *attachment) lose(err error) {
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	switch a.stage {
	case attached:
		a.moveTo(lost)
	case lingering:
		a.moveTo(detaching) // nobody is left to be told
	default:
		return
	}
	a.log.Error("the device was taken away", "vbd", a.vbdUUID, "err", err)
	a.end(fmt.Errorf("%w: %w", ErrLost, err))
	a.poke()
}

// abandon stops waiting for the users.
func (a *attachment) abandon() {
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	a.end(ErrClosed)
	if a.stage == attached || a.stage == lost {
		a.moveTo(detaching)
	}
}
