package service

import (
	"errors"
	"testing"
	"time"

	"xapi-nbd/xapi"
)

// TestHealthKeepsTheOrder: the call that ended last decides, even if another one is recorded
// after it.
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

// TestHealthReportsTheReturn: back is called once when xapi answers again, and not after a
// connection that broke.
func TestHealthReportsTheReturn(t *testing.T) {
	const method = "session.login_with_password"
	gone := &xapi.TransportError{Method: method, Err: errors.New("connection refused")}
	broke := &xapi.TransportError{Method: method, Sent: true, Err: errors.New("connection reset")}
	tests := []struct {
		name  string
		calls []error
		want  int
	}{
		{"always there", []error{nil, nil}, 0},
		{"away and back", []error{nil, gone, gone, nil, nil}, 1},
		{"away at first", []error{gone, nil}, 1},
		{"broke while away", []error{gone, broke, nil}, 1},
		{"broke", []error{nil, broke, nil}, 0},
		{"twice", []error{gone, nil, gone, nil}, 2},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := 0
			h := &health{back: func() { got++ }}
			for _, err := range tt.calls {
				h.called(method, 0, err)
			}
			if got != tt.want {
				t.Errorf("back was called %d times, want %d", got, tt.want)
			}
		})
	}
}
