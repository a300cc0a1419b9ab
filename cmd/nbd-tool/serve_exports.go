package main

import (
	"context"
	"sync/atomic"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdfile"
)

// open opens the file. Each connection opens it; the kernel keeps the open files consistent.
// A mirror must not use a file that clients write to.
func (x *export) open() (nbd.Device, error) {
	return nbdfile.Open(x.path, nbdfile.Options{ReadOnly: !x.writable, Shared: x.writable, Description: x.description})
}

// exportSet has the exports that clients can open. The devices that they have opened do
// not depend on it. What security requires is checked when a client opens an export, because
// a reload may have made it stricter since the client's handshake began.
type exportSet struct {
	exports  atomic.Pointer[[]export]
	security *currentTLS
}

// replace replaces all exports.
func (s *exportSet) replace(exports []export) { s.exports.Store(&exports) }

// Open implements nbd.Exporter.
func (s *exportSet) Open(_ context.Context, peer nbd.Peer, name string) (nbd.Device, error) {
	exports, err := s.exportsFor(peer)
	if err != nil {
		return nil, err
	}
	for _, x := range exports {
		if x.name == name {
			return x.open()
		}
	}
	return nil, nbd.Refuse(nbd.ErrUnknownExport, "no such export", nil)
}

// Recheck implements nbd.Rechecker.
func (s *exportSet) Recheck(_ context.Context, peer nbd.Peer, _ string) error {
	return s.security.admit(peer)
}

// List implements nbd.Lister.
func (s *exportSet) List(_ context.Context, peer nbd.Peer) (list []nbd.Export, err error) {
	exports, err := s.exportsFor(peer)
	for _, x := range exports {
		list = append(list, nbd.Export{Name: x.name, Description: x.description})
	}
	return list, err
}

// exportsFor returns the exports, if the client meets the requirements of security.
func (s *exportSet) exportsFor(peer nbd.Peer) ([]export, error) {
	// A reload stores the requirements first. In this order they are at least those that
	// belong to the exports.
	exports := *s.exports.Load()
	if err := s.security.admit(peer); err != nil {
		return nil, err
	}
	return exports, nil
}

// difference returns the names of the exports that are only in after, only in before, and in
// both with another path, mode or description.
func difference(before, after []export) (added, removed, changed []string) {
	old := make(map[string]export)
	for _, x := range before {
		old[x.name] = x
	}
	for _, x := range after {
		was, there := old[x.name]
		delete(old, x.name)
		switch {
		case !there:
			added = append(added, x.name)
		case was.path != x.path || was.writable != x.writable || was.description != x.description:
			changed = append(changed, x.name)
		}
	}
	for _, x := range before {
		if _, gone := old[x.name]; gone {
			removed = append(removed, x.name)
		}
	}
	return added, removed, changed
}
