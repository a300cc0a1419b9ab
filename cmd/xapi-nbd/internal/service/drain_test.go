package service

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// What was decided is not taken back: neither the end of a service that has drained,
// nor that by a signal.
func TestUndrainTooLate(t *testing.T) {
	empty := func() bool { return true }
	d := newDrainState()
	if d.decide(empty) {
		t.Error("a service that does not drain has decided to end")
	}
	if !d.start() || d.start() || !d.isOn() {
		t.Error("draining does not begin once")
	}
	if d.decide(func() bool { return false }) {
		t.Error("a service that serves somebody has decided to end")
	}
	if changed, err := d.takeBack(); !changed || err != nil || d.isOn() {
		t.Errorf("taken back in time: got %v, %v", changed, err)
	}
	d.start()
	if !d.decide(empty) {
		t.Error("a drained service has not decided to end")
	}
	if changed, err := d.takeBack(); changed || !errors.Is(err, errEnding) || !d.isOn() {
		t.Errorf("taken back after the decision: got %v, %v", changed, err)
	}
	for _, drains := range []bool{false, true} {
		d := newDrainState()
		if drains {
			d.start()
		}
		d.ending()
		if changed, err := d.takeBack(); changed || !errors.Is(err, errEnding) || d.isOn() != drains {
			t.Errorf("taken back after a signal, draining %v: got %v, %v", drains, changed, err)
		}
	}
}

// The wait for the end of a drain survives that the drain is taken back.
func TestDrainAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, empty := newDrainState(), atomic.Bool{}
		ended := make(chan bool, 1)
		go func() { ended <- d.wait(t.Context(), empty.Load) }()
		for range 3 {
			d.start()
			time.Sleep(2 * drainPoll)
			if _, err := d.takeBack(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * drainPoll)
		}
		empty.Store(true)
		time.Sleep(2 * drainPoll)
		select {
		case <-ended:
			t.Fatal("the service ends although it does not drain")
		default:
		}
		d.start()
		if !<-ended {
			t.Error("a drained service does not end")
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if newDrainState().wait(ctx, empty.Load) {
			t.Error("a service that was stopped counts as drained")
		}
	})
}
