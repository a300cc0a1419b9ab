// Package auth decides who may read what and over which transport: it takes an
// export name apart, asks xapi whether the session in it is valid and may plug a
// disk, and derives from the purposes of the pool's networks whether NBD is
// served with TLS, without, or not at all.
//
// It grants nothing by itself. A local login never fails for credentials, so
// whatever a client may do is decided by xapi, with the client's own session.
package auth
