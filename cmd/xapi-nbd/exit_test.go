package main

import (
	"errors"
	"fmt"
	"testing"

	"xapi-nbd/cmd/xapi-nbd/internal/service"
	"xapi-nbd/vdi"
)

// TestExitCode: of joined errors the one that ended the service decides, not vdi.ErrLeft.
func TestExitCode(t *testing.T) {
	other := errors.New("other")
	for _, tt := range []struct {
		err  error
		want int
	}{
		{other, exitUsage},
		{fmt.Errorf("a: %w", service.ErrStateFolder), exitUsage},
		{fmt.Errorf("a: %w", service.ErrListen), exitBind},
		{fmt.Errorf("a: %w", service.ErrXapiUnreachable), exitUnreachable},
		{fmt.Errorf("a: %w", vdi.ErrLeft), exitLeft},
		{errors.Join(service.ErrListen, vdi.ErrLeft), exitBind},
		{errors.Join(service.ErrXapiUnreachable, vdi.ErrLeft), exitUnreachable},
		{errors.Join(service.ErrStateFolder, vdi.ErrLeft), exitUsage},
		{errors.Join(other, vdi.ErrLeft), exitLeft},
		// VBDs are left, for any reason.
		{&exitError{exitLeft, fmt.Errorf("a: %w", service.ErrXapiUnreachable)}, exitLeft},
	} {
		if got := exitCode(tt.err); got != tt.want {
			t.Errorf("%v: got %d, want %d", tt.err, got, tt.want)
		}
	}
}
