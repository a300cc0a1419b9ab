package service

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestUndrainTooLate: draining can be canceled until the end is final, by draining or by a
// signal.
func TestUndrainTooLate(t *testing.T) {
	empty := func() bool { return true }
	d := newDrainState()
	if d.finish(empty) {
		t.Error("the end of a service that is not draining became final")
	}
	if !d.start() || d.start() || !d.isOn() {
		t.Error("draining did not start exactly once")
	}
	if d.finish(func() bool { return false }) {
		t.Error("the end of a service that still has connections became final")
	}
	if changed, err := d.cancel(); !changed || err != nil || d.isOn() {
		t.Errorf("canceled in time: got %v, %v", changed, err)
	}
	d.start()
	if !d.finish(empty) {
		t.Error("the end of a drained service did not become final")
	}
	if changed, err := d.cancel(); changed || !errors.Is(err, errEnding) || !d.isOn() {
		t.Errorf("canceled after the end became final: got %v, %v", changed, err)
	}
	for _, drains := range []bool{false, true} {
		d := newDrainState()
		if drains {
			d.start()
		}
		d.ending()
		if changed, err := d.cancel(); changed || !errors.Is(err, errEnding) || d.isOn() != drains {
			t.Errorf("canceled after a signal, draining %v: got %v, %v", drains, changed, err)
		}
	}
}

// TestDrainAgain: wait goes on waiting when draining is canceled and started again.
func TestDrainAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, empty := newDrainState(), atomic.Bool{}
		ended := make(chan bool, 1)
		go func() { ended <- d.wait(t.Context(), empty.Load) }()
		for range 3 {
			d.start()
			time.Sleep(2 * drainPoll)
			if _, err := d.cancel(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * drainPoll)
		}
		empty.Store(true)
		time.Sleep(2 * drainPoll)
		select {
		case <-ended:
			t.Fatal("the service ends although it is not draining")
		default:
		}
		d.start()
		if !<-ended {
			t.Error("a drained service did not end")
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if newDrainState().wait(ctx, empty.Load) {
			t.Error("a service that was stopped counts as drained")
		}
	})
}
