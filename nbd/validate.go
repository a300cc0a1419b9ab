package nbd

import "xapi-nbd/nbd/wire"

// validate decides about a request before anything is done for it: Success, or
// the error of section "Error values" that it gets. The connection goes on in
// either case.
func (s *session) validate(r wire.Request) wire.Errno {
	switch r.Command {
	case wire.CmdRead:
		return s.validateRead(r)
	case wire.CmdWrite, wire.CmdTrim, wire.CmdWriteZeroes:
		// Section "Transmission flags": READ_ONLY makes every write fail.
		return wire.EPERM
	default:
		return wire.EINVAL // not advertised, or unknown
	}
}

func (s *session) validateRead(r wire.Request) wire.Errno {
	switch {
	case r.Flags != 0:
		// FUA, DF and the rest are not advertised.
		return wire.EINVAL
	case r.Offset > s.info.Size || uint64(r.Length) > s.info.Size-r.Offset:
		return wire.EINVAL
	case r.Length > s.info.BlockSizes.MaxPayload:
		return wire.EINVAL
	case s.aligned && !s.isAligned(r):
		return wire.EINVAL
	}
	return wire.Success
}

// isAligned checks a request against the minimum block size. The last request
// of an export whose size is no multiple of it may end where the export ends.
func (s *session) isAligned(r wire.Request) bool {
	unit := uint64(s.info.BlockSizes.Min)
	if r.Offset%unit != 0 {
		return false
	}
	end := r.Offset + uint64(r.Length)
	return end%unit == 0 || end == s.info.Size
}
