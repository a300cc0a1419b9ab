package nbd

import "xapi-nbd/nbd/wire"

// session is what a negotiation ended with. It does not change any more; to
// hold one is to be in the transmission phase.
type session struct {
	device Device
	info   wire.ExportInfo
	// aligned: the client was told the minimum block size and keeps to it, so
	// a request that does not is an error. All others may read any byte.
	aligned bool
}

// session ends the negotiation with what it has opened.
func (n *negotiation) session(toldBlockSize bool) *session {
	s := &session{device: n.opened.device, info: n.opened.info, aligned: toldBlockSize}
	n.opened = nil
	return s
}
