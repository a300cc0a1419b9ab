package vdi

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"xapi-nbd/xapi"
)

// The keys of the inventory that this package uses.
const (
	keyControlDomain = "CONTROL_DOMAIN_UUID"
	keyInstallation  = "INSTALLATION_UUID"
)

// Host identifies this host in xapi's database. A uuid that the inventory does not have is
// "".
type Host struct {
	ControlDomain string // uuid of the VM that is dom0
	Installation  string // uuid of the host
}

// Missing returns the keys of the inventory that have no valid uuid.
func (h Host) Missing() (keys []string) {
	if h.ControlDomain == "" {
		keys = append(keys, keyControlDomain)
	}
	if h.Installation == "" {
		keys = append(keys, keyInstallation)
	}
	return keys
}

// xapi rewrites the inventory in place, so a reader may see a part of it. If a key is
// missing the file is read inventoryTries times.
const (
	inventoryTries = 5
	inventoryPause = 100 * time.Millisecond
)

// readInventory reads the identity of this host. The result must not be kept: it changes
// when the host leaves its pool.
func readInventory(ctx context.Context, path string) (Host, error) {
	var err error
	for range inventoryTries {
		var h Host
		if h, err = parseInventory(path); err == nil {
			return h, nil
		}
		select {
		case <-ctx.Done():
			return Host{}, context.Cause(ctx)
		case <-time.After(inventoryPause):
		}
	}
	return Host{}, err
}

// parseInventory reads the inventory once. All keys that matter have to be there.
func parseInventory(path string) (Host, error) {
	h, err := ReadInventory(path)
	if err != nil {
		return Host{}, fmt.Errorf("%w: %w", ErrInventory, err)
	}
	if missing := h.Missing(); len(missing) > 0 {
		return Host{}, fmt.Errorf("%w %s: no valid %s", ErrInventory, path, missing[0])
	}
	return h, nil
}

// ReadInventory reads the inventory once, even if keys are missing; see [Host.Missing]. The
// error is that of [os.ReadFile]. It parses KEY='value' lines as xapi does: it splits at
// the first "=", removes one pair of single quotes, then trims blanks. The last line of a
// key counts, and lines without "=" are ignored.
func ReadInventory(path string) (Host, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Host{}, err
	}
	values := make(map[string]string)
	for line := range strings.Lines(string(data)) {
		key, value, ok := strings.Cut(strings.TrimRight(line, "\r\n"), "=")
		if !ok {
			continue
		}
		if len(value) >= 2 && value[0] == '\'' && value[len(value)-1] == '\'' {
			value = value[1 : len(value)-1]
		}
		values[key] = strings.TrimSpace(value)
	}
	var h Host
	if uuid := values[keyControlDomain]; xapi.IsUUID(uuid) {
		h.ControlDomain = uuid
	}
	if uuid := values[keyInstallation]; xapi.IsUUID(uuid) {
		h.Installation = uuid
	}
	return h, nil
}

// controlDomain is the VM to which this service attaches VDIs.
type controlDomain struct {
	uuid string
	ref  xapi.VMRef
}

// controlDomain returns the ref of this host's control domain. It asks xapi once: a VM
// keeps its ref as long as its record exists.
func (m *Manager) controlDomain(ctx context.Context, s *xapi.Session, h Host) (xapi.VMRef, error) {
	m.mu.Lock()
	known := m.dom0
	m.mu.Unlock()
	if known.uuid == h.ControlDomain {
		return known.ref, nil
	}
	ref, err := s.VMByUUID(ctx, h.ControlDomain)
	if err != nil {
		return "", err
	}
	m.rememberControlDomain(controlDomain{h.ControlDomain, ref})
	return ref, nil
}

// rememberControlDomain stores the result for controlDomain. The zero value makes
// controlDomain ask xapi again: refs change when xapi's database is restored, for example.
func (m *Manager) rememberControlDomain(d controlDomain) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dom0 = d
}
