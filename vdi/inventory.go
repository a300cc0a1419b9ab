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

// host identifies this host in xapi's database.
type host struct {
	controlDomain string // uuid of the VM that is dom0
	installation  string // uuid of the host
}

// xapi rewrites the inventory in place, so a reader may see a part of it. If a key is
// missing the file is read inventoryTries times.
const (
	inventoryTries = 5
	inventoryPause = 100 * time.Millisecond
)

// readInventory reads the identity of this host. The result must not be kept: it changes
// when the host leaves its pool.
func readInventory(ctx context.Context, path string) (host, error) {
	var err error
	for range inventoryTries {
		var h host
		if h, err = parseInventory(path); err == nil {
			return h, nil
		}
		select {
		case <-ctx.Done():
			return host{}, context.Cause(ctx)
		case <-time.After(inventoryPause):
		}
	}
	return host{}, err
}

// parseInventory parses KEY='value' lines as xapi does: it splits at the first "=", removes
// one pair of single quotes, then trims blanks. The last line of a key counts, and lines
// without "=" are ignored.
func parseInventory(path string) (host, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return host{}, fmt.Errorf("%w: %w", ErrInventory, err)
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
	h := host{controlDomain: values[keyControlDomain], installation: values[keyInstallation]}
	switch {
	case !xapi.IsUUID(h.controlDomain):
		return host{}, fmt.Errorf("%w %s: no valid %s", ErrInventory, path, keyControlDomain)
	case !xapi.IsUUID(h.installation):
		return host{}, fmt.Errorf("%w %s: no valid %s", ErrInventory, path, keyInstallation)
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
func (m *Manager) controlDomain(ctx context.Context, s *xapi.Session, h host) (xapi.VMRef, error) {
	m.mu.Lock()
	known := m.dom0
	m.mu.Unlock()
	if known.uuid == h.controlDomain {
		return known.ref, nil
	}
	ref, err := s.VMByUUID(ctx, h.controlDomain)
	if err != nil {
		return "", err
	}
	m.rememberControlDomain(controlDomain{h.controlDomain, ref})
	return ref, nil
}

// rememberControlDomain stores the result for controlDomain. The zero value makes
// controlDomain ask xapi again: refs change when xapi's database is restored, for example.
func (m *Manager) rememberControlDomain(d controlDomain) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dom0 = d
}
