package vdi_test

import (
	"errors"
	"path/filepath"
	"testing"

	"xapi-nbd/vdi"
)

// successor opens a manager with the locks of m, which then gives them up.
func (f *fixture) successor(m *vdi.Manager, inventory string) *vdi.Manager {
	f.t.Helper()
	cfg := f.cfg
	var err error
	cfg.Locks, err = m.Locks()
	do(f.t, err)
	cfg.Inventory = inventory
	next, err := vdi.Open(cfg)
	do(f.t, err)
	f.t.Cleanup(next.Kill)
	do(f.t, m.ReleaseLocks())
	return next
}

// wantHostLocked requires that the host is, or is not, locked by a process.
func (f *fixture) wantHostLocked(when string, locked bool) {
	f.t.Helper()
	cfg := f.cfg
	cfg.StateDir = filepath.Join(f.t.TempDir(), "other")
	other, err := vdi.Open(cfg)
	if err == nil {
		do(f.t, other.Close(f.t.Context()))
	}
	if errors.Is(err, vdi.ErrLocked) != locked {
		f.t.Errorf("%s: another process that serves the host: got %v, want it refused: %v", when, err, locked)
	}
}

// The second process of two upgrades cannot read the inventory and so does not use the lock of the
// host: it passes it on, or releases it, all the same.
func TestHostLockThatWasNotUsed(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "no-inventory")
	t.Run("passed on", func(t *testing.T) {
		f := newFixture(t)
		second := f.successor(f.manager, missing)
		f.closeManager()
		f.wantHostLocked("after the first upgrade", true)
		third := f.successor(second, f.cfg.Inventory)
		do(t, second.Close(t.Context()))
		f.wantHostLocked("after the second upgrade", true)
		do(t, third.Close(t.Context()))
		f.wantHostLocked("after the end of all", false)
	})
	t.Run("given up", func(t *testing.T) {
		f := newFixture(t)
		second := f.successor(f.manager, missing)
		f.closeManager()
		do(t, second.ReleaseLocks())
		f.wantHostLocked("after ReleaseLocks", false)
		do(t, second.Close(t.Context()))
	})
	t.Run("closed", func(t *testing.T) {
		f := newFixture(t)
		second := f.successor(f.manager, missing)
		f.closeManager()
		do(t, second.Close(t.Context()))
		f.wantHostLocked("after Close", false)
	})
}

// A manager that is closed before Lock was called gives up the locks that it has inherited.
func TestInheritedLocksAreClosed(t *testing.T) {
	f := newFixture(t)
	cfg := f.cfg
	var err error
	cfg.Locks, err = f.manager.Locks()
	do(t, err)
	next := vdi.New(cfg)
	do(t, f.manager.ReleaseLocks())
	f.closeManager()
	f.wantHostLocked("before Close", true)
	do(t, next.Close(t.Context()))
	f.wantHostLocked("after Close", false)
	f.manager = f.open() // the state folder is free too
	f.closeManager()
}
