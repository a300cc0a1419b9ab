package vdi_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"xapi-nbd/vdi"
	"xapi-nbd/xapi/xapitest"
)

// unplugOurs unplugs a VBD of this service, as another client of xapi does. If devices are
// called nbdN the unplug waits until the service has noticed it and closed the device.
func (m *machine) unplugOurs(t *rapid.T) {
	v := m.drawVBD(t, m.mayBeUnplugged)
	unplugged := m.startUnplug(v)
	if m.style == xapitest.StyleNBD {
		m.readLost(t, v)
	}
	time.Sleep(2 * time.Second) // fake time: an attachment checks its device every second
	synctest.Wait()
	m.endLifetimes(t)
	synctest.Wait()
	m.out.do(func() { <-unplugged })
}

// readLost reads from a device that has just been disconnected: it may be bound to another
// disk already.
func (m *machine) readLost(t *rapid.T, v xapitest.VBD) {
	served := slices.ContainsFunc(m.service.manager.Attachments(), func(a vdi.Attachment) bool { return a.VBD == v.UUID })
	for _, c := range m.conns {
		if !served || c.model.uuid != v.VDI {
			continue
		}
		r := &request{conn: c, p: make([]byte, 512)}
		r.do()
		if r.err == nil {
			t.Fatal("a device was read that may be bound to another disk")
		}
		m.concludeRead(t, r)
	}
}

// startUnplug begins to unplug a VBD of this service, and returns when the unplug has begun.
func (m *machine) startUnplug(v xapitest.VBD) (unplugged chan struct{}) {
	m.out.do(func() {
		unplugged = make(chan struct{})
		ctx, cancel := context.WithCancel(context.Background())
		go func() {
			_ = m.spy.interfere(v.UUID, m.host.UnplugVBD) // may be refused
			close(unplugged)
			cancel()
		}()
		_ = m.host.Wait(ctx, func([]xapitest.VBD) bool {
			_, err := os.Stat(filepath.Join(m.host.DeviceDir(), v.Device))
			return os.IsNotExist(err)
		})
	})
	return unplugged
}

// destroyOurs destroys a VBD of this service, as another client of xapi does.
func (m *machine) destroyOurs(t *rapid.T) {
	v := m.drawVBD(t, func(v xapitest.VBD) bool { return !v.CurrentlyAttached })
	m.out.do(func() { _ = m.spy.interfere(v.UUID, m.host.DestroyVBD) })
}

// toggleForeign plugs or unplugs a VBD of another tool.
func (m *machine) toggleForeign(t *rapid.T) {
	f := m.foreign[0]
	if f.plugged && m.isOpen(f.disk.uuid) && m.isDisturbed(f.disk) {
		t.Skip("it would be refused: the service has the device open and no VBD any more")
	}
	var err error
	m.out.do(func() {
		if f.plugged {
			err = m.host.UnplugVBD(context.Background(), f.uuid)
		} else {
			err = m.host.PlugForeign(f.uuid)
		}
	})
	if err != nil {
		t.Fatalf("foreign VBD, plugged: %t: %v", f.plugged, err)
	}
	f.plugged = !f.plugged
	m.shared[f.disk.uuid] = true
}
