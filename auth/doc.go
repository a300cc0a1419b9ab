// Package auth decides which client may read which disk, and over which transport. It
// parses an export name, asks xapi whether the session in it is valid and may plug a
// disk, asks again while connections of the session last, and derives from the purposes
// of the pool's networks whether NBD is served with TLS, without TLS, or not at all.
//
// It grants nothing by itself: xapi decides about a client with the client's own session.
// The service's local session decides nothing, because a local login never fails for
// credentials.
//
// # Sessions that end
//
// A session that is logged out must end its connections, but a restart of xapi, which
// ends all sessions, must not end any. xapi answers both in the same way, so a
// [Rechecker] compares with a local session: if that is as old as the client's and still
// valid, there was no restart. In doubt a connection goes on.
package auth
