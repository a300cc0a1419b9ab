package vdi

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"xapi-nbd/xapi"
)

// The keys of the inventory that matter here.
const (
	keyControlDomain = "CONTROL_DOMAIN_UUID"
	keyInstallation  = "INSTALLATION_UUID"
)

// host is who this host is in xapi's database.
type host struct {
	controlDomain string // uuid of the VM that is dom0
	installation  string // uuid of the host
}

// xapi rewrites the inventory in place, so a reader may see half of it: a
// missing key is worth a few more looks.
const (
	inventoryTries = 5
	inventoryPause = 100 * time.Millisecond
)

// readInventory reads who this host is. It is read for every use: the answer
// changes when the host leaves its pool.
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

// parseInventory reads KEY='value' lines the way xapi does: cut at the first
// "=", one pair of single quotes dropped, blanks trimmed, the last line of a
// key wins, lines without "=" mean nothing.
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

// controlDomain is the VM that VBDs of this host belong to.
type controlDomain struct {
	uuid string
	ref  xapi.VMRef
}

// controlDomain returns the ref of this host's control domain. xapi keeps a VM's
// ref for as long as its record, so it is asked once.
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

// rememberControlDomain spares the next question. With the zero value the next
// one is asked again: after a restore of xapi's database, say, there are other
// refs.
func (m *Manager) rememberControlDomain(d controlDomain) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dom0 = d
}
