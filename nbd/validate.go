package nbd

import "xapi-nbd/nbd/wire"

// validate returns the error of section "Error values" with which a request must be
// refused, or Success. It does not call the device.
func (s *session) validate(r wire.Request) wire.Errno {
	c, ok := commands[r.Command]
	switch {
	case !ok:
		return wire.EINVAL
	case c.writes && s.can.writer == nil:
		return wire.EPERM
	case !c.offered(s), r.Flags&^s.allowedFlags(c) != 0:
		return wire.EINVAL
	case r.Flags&wire.CmdFlagPayloadLen != 0 && !c.moves:
		// The length is that of the payload, which has the range.
		return wire.Success
	case c.ranged:
		return s.validateRange(c, r)
	}
	return wire.Success
}

// allowedFlags returns the flags that a command may have in this session, section "Command
// flags".
func (s *session) allowedFlags(c *command) wire.CommandFlags {
	flags := c.flags
	if s.can.canFUA() {
		flags |= wire.CmdFlagFUA
	}
	if s.mode != extendedHeaders {
		flags &^= wire.CmdFlagPayloadLen
	}
	if s.mode == simpleReplies {
		flags &^= wire.CmdFlagDF
	}
	if !s.can.fastZero {
		flags &^= wire.CmdFlagFastZero
	}
	return flags
}

// validateRange checks a request against the size and the size constraints of the export.
func (s *session) validateRange(c *command, r wire.Request) wire.Errno {
	switch {
	case r.Offset > s.info.Size || r.Length > s.info.Size-r.Offset:
		return c.past
	case c.moves && r.Length > uint64(s.info.BlockSizes.MaxPayload):
		return wire.EINVAL
	case s.aligned && !s.isAligned(r):
		return wire.EINVAL
	}
	return wire.Success
}

// isAligned checks a request against the minimum block size. A request may also end where
// the export ends, even if its size is no multiple of the block size.
func (s *session) isAligned(r wire.Request) bool {
	unit := uint64(s.info.BlockSizes.Min)
	if r.Offset%unit != 0 {
		return false
	}
	end := r.Offset + r.Length
	return end%unit == 0 || end == s.info.Size
}

// payloadLength returns how many bytes of payload follow a request, also if it will be
// refused: they must not be parsed as requests.
func (s *session) payloadLength(r wire.Request) uint64 {
	if r.Command == wire.CmdWrite || (s.mode == extendedHeaders && r.Flags&wire.CmdFlagPayloadLen != 0) {
		return r.Length
	}
	return 0
}
