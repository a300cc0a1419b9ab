package nbd

import "xapi-nbd/nbd/wire"

// replyMode is the negotiated form of requests and replies. Each mode includes the modes
// before it.
type replyMode int

const (
	simpleReplies     replyMode = iota
	structuredReplies           // NBD_OPT_STRUCTURED_REPLY
	extendedHeaders             // NBD_OPT_EXTENDED_HEADERS
)

// session is the result of a handshake. It does not change.
type session struct {
	device     Device
	can        capabilities
	info       wire.ExportInfo
	exportName string // as the client sent it; may be secret
	mode       replyMode
	// contexts are the metadata contexts selected for this export.
	contexts []wire.MetaContext
	// aligned is true if the client asked for the size constraints. Then a request that
	// is not a multiple of the minimum block size is an error. Other clients may use any
	// offset and length.
	aligned bool
}

// session returns the session for the export that was opened.
func (n *negotiation) session(toldBlockSize bool) *session {
	s := &session{
		device: n.opened.device, can: n.opened.can, info: n.info(n.opened),
		mode: n.replies, aligned: toldBlockSize, exportName: n.opened.name,
	}
	if n.selected.export == n.opened.name {
		s.contexts = n.selected.contexts
	}
	n.opened = nil
	return s
}
