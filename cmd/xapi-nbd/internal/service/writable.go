package service

import (
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/wire"
	"xapi-nbd/vdi"
)

var (
	_ nbd.Writer      = (*watchedWriter)(nil)
	_ nbd.Flusher     = (*watchedWriter)(nil)
	_ nbd.FUAWriter   = (*watchedWriter)(nil)
	_ nbd.Trimmer     = (*watchedWriter)(nil)
	_ nbd.ZeroWriter  = (*watchedWriter)(nil)
	_ nbd.MultiConner = (*watchedWriter)(nil)
	_ nbd.Capable     = (*watchedWriter)(nil)
	_ nbd.ErrorCloser = (*watchedWriter)(nil)
	_ nbd.Revocable   = (*watchedWriter)(nil)
	_ nbd.Pacer       = (*watchedWriter)(nil)
)

// watchedWriter is a watchedDisk that can be written. It has the methods of the
// vdi.WritableDisk by name: embedding both would make those of vdi.Disk ambiguous.
type watchedWriter struct {
	*watchedDisk
	disk *vdi.WritableDisk
}

// Capabilities implements nbd.Capable.
func (d *watchedWriter) Capabilities() wire.TransmissionFlags {
	flags := wire.FlagSendFlush | wire.FlagSendFUA | wire.FlagSendWriteZeroes | wire.FlagSendFastZero | wire.FlagCanMultiConn
	if d.disk.CanTrim() {
		flags |= wire.FlagSendTrim
	}
	return flags
}

// MultiConn implements nbd.MultiConner: all connections use one open device, past the page
// cache.
func (d *watchedWriter) MultiConn() bool { return true }

// WriteAt implements nbd.Writer.
func (d *watchedWriter) WriteAt(p []byte, off int64) (int, error) { return d.disk.WriteAt(p, off) }

// Flush implements nbd.Flusher.
func (d *watchedWriter) Flush() error { return d.disk.Flush() }

// Trim implements nbd.Trimmer.
func (d *watchedWriter) Trim(off, n int64) error { return d.disk.Trim(off, n) }

// WriteZeroes implements nbd.ZeroWriter.
func (d *watchedWriter) WriteZeroes(off, n int64, noHole, fast bool) error {
	return d.disk.WriteZeroes(off, n, noHole, fast)
}

// WriteFUA implements nbd.FUAWriter.
func (d *watchedWriter) WriteFUA(p []byte, off int64) error { return d.disk.WriteFUA(p, off) }

// TrimFUA implements nbd.FUAWriter.
func (d *watchedWriter) TrimFUA(off, n int64) error { return d.disk.TrimFUA(off, n) }

// WriteZeroesFUA implements nbd.FUAWriter.
func (d *watchedWriter) WriteZeroesFUA(off, n int64, noHole, fast bool) error {
	return d.disk.WriteZeroesFUA(off, n, noHole, fast)
}

// CloseWithError implements nbd.ErrorCloser.
func (d *watchedWriter) CloseWithError(err error) error {
	d.stop()
	return d.disk.CloseWithError(err)
}
