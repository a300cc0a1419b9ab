// Package service puts the parts of xapi-nbd together: the NBD server (package nbd), sessions
// (auth), attachments (vdi), TLS (tls) and xapi. [New] opens what it needs, [Service.Run]
// serves until it is told to stop. Errors that end it match [ErrStateFolder], [ErrListen],
// [ErrXapiUnreachable] or [vdi.ErrLeft].
//
// It does not know command lines, signals and exit codes: those are main's. exporter.go is
// the only place where the errors of auth, vdi and xapi become answers to clients.
package service
