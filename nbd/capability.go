package nbd

import (
	"io"

	"xapi-nbd/nbd/internal/zerocopy"
	"xapi-nbd/nbd/wire"
)

// capabilities are the capabilities of a device besides reading, found once when it is
// opened. A field is nil if the device does not have the capability.
type capabilities struct {
	writer    io.WriterAt // nil: the export is read-only
	flusher   Flusher
	fua       FUAWriter
	through   bool // changes are on stable storage at once, see WriteThrough
	trimmer   Trimmer
	zeroer    ZeroWriter
	fastZero  bool // zeroer can be asked to be fast
	cacher    Cacher
	extenter  Extenter
	runner    DataRunner
	contexter Contexter
	revocable Revocable
	closer    ErrorCloser
	file      *zerocopy.File // of a FileBacked; nil if there is none or the system cannot use it
	pacer     Pacer
	multi     bool
}

func capabilitiesOf(d Device) capabilities {
	if r, ok := d.(readOnly); ok {
		return capabilitiesOf(r.Device).readOnly()
	}
	c := methodsOf(d)
	if l, ok := d.(Capable); ok {
		c = c.limitedTo(l.Capabilities())
	}
	return c
}

// methodsOf returns the capabilities for which a device has methods.
func methodsOf(d Device) capabilities {
	c := capabilities{multi: true}
	c.cacher, _ = d.(Cacher)
	c.extenter, _ = d.(Extenter)
	c.runner, _ = d.(DataRunner)
	c.contexter, _ = d.(Contexter)
	c.revocable, _ = d.(Revocable)
	c.closer, _ = d.(ErrorCloser)
	c.pacer, _ = d.(Pacer)
	if b, ok := d.(FileBacked); ok {
		if f := b.File(); f != nil {
			c.file = zerocopy.NewFile(int(f.Fd()), b.Verify)
		}
	}
	if c.writer, _ = d.(io.WriterAt); c.writer == nil {
		return c
	}
	c.flusher, _ = d.(Flusher)
	c.trimmer, _ = d.(Trimmer)
	c.zeroer, c.fastZero = d.(ZeroWriter)
	w, ok := d.(WriteThrough)
	c.through = ok && w.WritesThrough()
	m, ok := d.(MultiConner)
	c.multi = ok && m.MultiConn()
	c.fua, _ = d.(FUAWriter)
	return c
}

// limitedTo returns the capabilities without those whose flags are not set.
func (c capabilities) limitedTo(f wire.TransmissionFlags) capabilities {
	if f&wire.FlagSendCache == 0 {
		c.cacher = nil
	}
	if c.writer == nil || f&wire.FlagReadOnly != 0 {
		return c.readOnly()
	}
	if f&wire.FlagSendFlush == 0 {
		c.flusher, c.through = nil, false
	}
	if f&wire.FlagSendFUA == 0 {
		c.fua = nil
	}
	if f&wire.FlagSendTrim == 0 {
		c.trimmer = nil
	}
	if f&wire.FlagSendWriteZeroes == 0 {
		c.zeroer = nil
	}
	c.fastZero = c.zeroer != nil && c.fastZero && f&wire.FlagSendFastZero != 0
	c.multi = c.multi && f&wire.FlagCanMultiConn != 0
	return c
}

// readOnly leaves out everything that changes the export. A view of a device that
// others may write keeps no other promise of coherence than the device does.
func (c capabilities) readOnly() capabilities {
	c.writer, c.flusher, c.fua, c.trimmer, c.zeroer = nil, nil, nil, nil, nil
	c.through, c.fastZero = false, false
	return c
}

func (c capabilities) canFlush() bool { return c.flusher != nil || c.through }

func (c capabilities) canFUA() bool { return c.canFlush() || c.fua != nil }

// transmissionFlags returns the flags of the capabilities, section "Transmission flags".
func (c capabilities) transmissionFlags(mode replyMode) wire.TransmissionFlags {
	f := wire.FlagHasFlags
	set := func(holds bool, flag wire.TransmissionFlags) {
		if holds {
			f |= flag
		}
	}
	writable := c.writer != nil
	set(!writable, wire.FlagReadOnly)
	set(writable, wire.FlagSendWriteZeroes)
	set(c.canFlush(), wire.FlagSendFlush)
	set(c.canFUA(), wire.FlagSendFUA)
	set(c.trimmer != nil, wire.FlagSendTrim)
	set(c.fastZero, wire.FlagSendFastZero)
	set(c.cacher != nil, wire.FlagSendCache)
	set(c.multi, wire.FlagCanMultiConn)
	set(mode != simpleReplies, wire.FlagSendDF)
	set(mode == extendedHeaders, wire.FlagBlockStatusPayload)
	return f
}
