// Package auth decides who may read what and over which transport: it takes an
// export name apart, asks xapi whether the session in it is valid and may plug a
// disk, asks again as long as its connections go on, and derives from the
// purposes of the pool's networks whether NBD is served with TLS, without, or not
// at all.
//
// It grants nothing by itself. A local login never fails for credentials, so
// whatever a client may do is decided by xapi, with the client's own session.
//
// # Sessions that end
//
// Whoever ends a session expects its connections to end too; but a restart of
// xapi ends all sessions and must not interrupt anybody. xapi's answers to the
// two do not differ, so a Rechecker compares with a local session: if that is as
// old as the client's and still alive, there was no restart. In doubt a
// connection goes on.
package auth
