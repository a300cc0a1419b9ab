package nbd

import "xapi-nbd/nbd/wire"

// replyMode is how requests and replies look, as negotiated. Later ones include
// what earlier ones can do.
type replyMode int

const (
	simpleReplies     replyMode = iota
	structuredReplies           // NBD_OPT_STRUCTURED_REPLY
	extendedHeaders             // NBD_OPT_EXTENDED_HEADERS
)

// session is what a negotiation ended with. It does not change any more; to
// hold one is to be in the transmission phase.
type session struct {
	device     Device
	can        capabilities
	info       wire.ExportInfo
	exportName string // as the client gave it: it may hold secrets
	mode       replyMode
	// contexts are the metadata contexts selected for this export.
	contexts []wire.MetaContext
	// aligned: the client was told the minimum block size and keeps to it, so
	// a request that does not is an error. All others may use any byte.
	aligned bool
}

// session ends the negotiation with what it has opened.
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
