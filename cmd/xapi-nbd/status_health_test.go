package main

import (
	"errors"
	"testing"
	"time"
)

// Of two calls the one that ended last says whether xapi answers, though the other
// one is noted after it.
func TestHealthKeepsTheOrder(t *testing.T) {
	gone := errors.New("connection refused")
	for _, tt := range []struct {
		name        string
		first, last error
		want        bool
	}{
		{"xapi went away", nil, gone, false},
		{"xapi came back", gone, nil, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ended, noted := make(chan struct{}), make(chan struct{})
			h := &health{observe: func(method string, _ time.Duration, _ string) {
				if method == "first" {
					close(ended)
					<-noted
				}
			}}
			over := make(chan struct{})
			go func() {
				defer close(over)
				h.called("first", 0, tt.first)
			}()
			<-ended
			h.called("last", 0, tt.last)
			close(noted)
			<-over
			if got := h.report().Reachable; got != tt.want {
				t.Errorf("reachable: got %v", got)
			}
		})
	}
}
