package service

import (
	"errors"
	"fmt"
	"testing"

	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
)

// TestRecoverErrorsSurviveTheSocket: the error of a clean-up by the service matches the same
// kinds after it has passed the control socket.
func TestRecoverErrorsSurviveTheSocket(t *testing.T) {
	kinds := []error{ErrXapiUnreachable, vdi.ErrInventory, vdi.ErrLeft}
	for _, tt := range []struct {
		err  error
		want error
	}{
		{&xapi.TransportError{Err: errors.New("connection refused")}, ErrXapiUnreachable},
		{&xapi.TransportError{Err: xapi.ErrAnswer}, vdi.ErrLeft},
		{fmt.Errorf("VBD.get_record: %w", &xapi.Error{Code: "INTERNAL_ERROR"}), vdi.ErrLeft},
		{fmt.Errorf("%w: no such file", vdi.ErrInventory), vdi.ErrInventory},
		{errors.New("disk full"), vdi.ErrLeft},
	} {
		got := recoverError(newRecoverReport(vdi.Recovered{}, tt.err))
		if got == nil || got.Error() != tt.err.Error() {
			t.Errorf("got the text of %v, want that of %v", got, tt.err)
		}
		for _, kind := range kinds {
			if errors.Is(got, kind) != errors.Is(tt.want, kind) {
				t.Errorf("%v: matches %v: %v, want the kind %v", tt.err, kind, errors.Is(got, kind), tt.want)
			}
		}
	}
	if err := recoverError(newRecoverReport(vdi.Recovered{}, nil)); err != nil {
		t.Errorf("without an error: got %v", err)
	}
}
