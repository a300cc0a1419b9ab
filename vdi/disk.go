package vdi

import "sync"

// Disk is one user's share of an attachment. ReadAt may be called concurrently
// and at any alignment. Close gives the share back, once, after all ReadAt have
// returned; further calls do nothing.
type Disk struct {
	a    *attachment
	once sync.Once
}

// ReadAt implements io.ReaderAt.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) { return d.a.dev.ReadAt(p, off) }

// Size is the size of the device in bytes, as it was when it was attached.
func (d *Disk) Size() int64 { return d.a.dev.Size() }

// BlockSizes are the size constraints in bytes: the minimum is the device's
// logical sector size, the others are the protocol's defaults (0).
func (d *Disk) BlockSizes() (minimum, preferred, maxPayload uint32) {
	return d.a.dev.MinBlock(), 0, 0
}

// Description is a text for people: the VDI's uuid and name.
func (d *Disk) Description() string { return d.a.description }

// CanonicalName is the VDI's part of the export name: it carries no session.
func (d *Disk) CanonicalName() string { return "/" + d.a.vdi }

// Close returns at once; the last user's starts the detach, which
// [Manager.Close] waits for.
func (d *Disk) Close() error {
	d.once.Do(func() { d.a.m.release(d.a) })
	return nil
}
