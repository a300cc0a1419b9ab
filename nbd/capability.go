package nbd

import (
	"io"

	"xapi-nbd/nbd/wire"
)

// capabilities is what a device can do beyond being read, asked once when it is
// opened. A nil field is something that it cannot do.
type capabilities struct {
	writer   io.WriterAt // nil: the export is read-only
	flusher  Flusher
	trimmer  Trimmer
	zeroer   ZeroWriter
	cacher   Cacher
	extenter Extenter
	mortal   Mortal
	ender    Ender
	file     FileBacked
	pacer    Pacer
	multi    bool
}

func capabilitiesOf(d Device) capabilities {
	c := capabilities{multi: true}
	c.cacher, _ = d.(Cacher)
	c.extenter, _ = d.(Extenter)
	c.mortal, _ = d.(Mortal)
	c.ender, _ = d.(Ender)
	c.pacer, _ = d.(Pacer)
	if f, ok := d.(FileBacked); ok && f.File() != nil {
		c.file = f
	}
	if c.writer, _ = d.(io.WriterAt); c.writer == nil {
		return c
	}
	c.flusher, _ = d.(Flusher)
	c.trimmer, _ = d.(Trimmer)
	c.zeroer, _ = d.(ZeroWriter)
	m, ok := d.(MultiConner)
	c.multi = ok && m.MultiConn()
	return c
}

// transmissionFlags says what can be done, section "Transmission flags": a flag
// is set for what works, and for nothing else. A writable device without a
// Flusher writes through, so flushing it works by doing nothing.
func (c capabilities) transmissionFlags(mode replyMode) wire.TransmissionFlags {
	f := wire.FlagHasFlags
	set := func(holds bool, flag wire.TransmissionFlags) {
		if holds {
			f |= flag
		}
	}
	writable := c.writer != nil
	set(!writable, wire.FlagReadOnly)
	set(writable, wire.FlagSendFlush|wire.FlagSendFUA|wire.FlagSendWriteZeroes)
	set(c.trimmer != nil, wire.FlagSendTrim)
	set(c.zeroer != nil, wire.FlagSendFastZero)
	set(c.cacher != nil, wire.FlagSendCache)
	set(c.multi, wire.FlagCanMultiConn)
	set(mode != simpleReplies, wire.FlagSendDF)
	set(mode == extendedHeaders, wire.FlagBlockStatusPayload)
	return f
}
