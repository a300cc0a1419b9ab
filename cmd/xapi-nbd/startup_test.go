package main

import (
	"context"
	"testing"
	"time"
)

func TestClientsWaitForTheFirstAnswer(t *testing.T) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	opened := newLatch()
	opened.open()
	soon := newLatch()
	for _, tt := range []struct {
		name  string
		ctx   context.Context
		latch latch
		grace time.Duration
		want  bool
	}{
		{"it has come", t.Context(), opened, -time.Hour, true},
		{"it comes within the grace", t.Context(), soon, time.Hour, true},
		{"the grace is over", t.Context(), newLatch(), -time.Hour, false},
		{"the client has gone", ended, newLatch(), time.Hour, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.latch == soon {
				go soon.open()
			}
			f := firstAnswer{tt.latch, time.Now().Add(tt.grace)}
			if got := f.came(tt.ctx); got != tt.want {
				t.Errorf("got %v", got)
			}
		})
	}
}
