package nbdtest

import (
	"context"
	"slices"
	"sync"

	"xapi-nbd/nbd"
)

var _ nbd.Exporter = (*Exporter)(nil)

// Exporter is an [nbd.Exporter] with an export for each name in a map. It records its calls.
// Exports must not change once it is in use. The methods may be called concurrently.
type Exporter struct {
	// Exports has a function for each name, which opens the export. Other names are
	// refused as unknown.
	Exports map[string]func() (nbd.Device, error)

	mu    sync.Mutex // guards the fields below
	opens []Open
}

// Open describes one call of [Exporter.Open].
type Open struct {
	Peer   nbd.Peer
	Name   string
	Device nbd.Device // nil if it was refused
	Err    error
}

// Single returns an Exporter with one device under one name. Each call of Open returns the
// same device, so it is for one connection, which closes the device.
func Single(name string, d nbd.Device) *Exporter {
	return &Exporter{Exports: map[string]func() (nbd.Device, error){
		name: func() (nbd.Device, error) { return d, nil },
	}}
}

// Open implements [nbd.Exporter].
func (e *Exporter) Open(_ context.Context, peer nbd.Peer, name string) (nbd.Device, error) {
	o := Open{Peer: peer, Name: name}
	if open := e.Exports[name]; open != nil {
		o.Device, o.Err = open()
	} else {
		o.Err = nbd.Refuse(nbd.ErrUnknownExport, "no such export", nil)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.opens = append(e.opens, o)
	return o.Device, o.Err
}

// Opens returns the calls of Open up to now, in the order in which they returned.
func (e *Exporter) Opens() []Open {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.opens)
}

// Names returns the names in Opens.
func (e *Exporter) Names() []string {
	var names []string
	for _, o := range e.Opens() {
		names = append(names, o.Name)
	}
	return names
}
