package main

import (
	"context"
	"os"
	"time"

	"xapi-nbd/cmd/nbd-tool/internal/control"
	"xapi-nbd/mirror"
)

// controlled is a mirror as its controllers see it.
type controlled struct{ j *mirrorJob }

// Status implements [control.Mirror].
func (c controlled) Status() *control.Status {
	s := c.j.mirror.Status()
	r := &control.Status{
		State: s.State.String(), Mode: s.Mode.String(), Paused: s.Paused, Ended: s.State.Ended(),
		Size: s.Size, Dirty: s.Dirty, Copied: s.Copied, Sent: s.Sent, Rate: int64(s.Rate),
		Converges: s.Converging, Stalls: s.Stalls, Losses: s.Losses,
		Complete:  s.State == mirror.Pivoted || s.State == mirror.Stopped,
		Serving:   servingEnd(s),
		Listening: []string{shown(c.j.listener.Addr())}, PID: os.Getpid(),
		Percent: 100,
	}
	if s.Size > 0 {
		r.Percent = 100 * float64(s.Size-s.Dirty) / float64(s.Size)
	}
	if s.TimeLeft >= 0 {
		left := int64((s.TimeLeft + time.Second/2) / time.Second)
		r.SecondsLeft = &left
	}
	if s.LastError != nil {
		r.LastError = printable(string(redact([]byte(s.LastError.Error()))))
	}
	return r
}

func servingEnd(s mirror.Status) string {
	switch {
	case s.State == mirror.Stopped:
		return "none"
	case s.OnSecondary:
		return "secondary"
	}
	return "primary"
}

// Pause implements [control.Mirror].
func (c controlled) Pause() { c.j.mirror.Pause() }

// Resume implements [control.Mirror].
func (c controlled) Resume() { c.j.mirror.Resume() }

// Complete implements [control.Mirror]. The mirror is completed even if the controller that
// has asked goes away.
func (c controlled) Complete(pivot, verify bool) error {
	end := mirror.StopClients
	if pivot {
		end = mirror.Pivot
	}
	if err := c.j.ends.check(); err != nil {
		return err
	}
	return c.j.mirror.Complete(context.Background(), end, verify)
}

// Cancel implements [control.Mirror].
func (c controlled) Cancel() error { return c.j.mirror.Cancel() }

// Wait implements [control.Mirror].
func (c controlled) Wait(ctx context.Context) error { return c.j.mirror.Wait(ctx) }
