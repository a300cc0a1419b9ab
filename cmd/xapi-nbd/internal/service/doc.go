// Package service puts the parts of xapi-nbd together: the NBD server (package nbd), sessions
// (auth), attachments (vdi), TLS (tls) and xapi. [New] opens files and sockets,
// [Service.Run] serves until its context stop ends. Errors that end it match
// [ErrStateFolder], [ErrListen], [ErrXapiUnreachable] or [vdi.ErrLeft].
//
// Command lines, signals and exit codes belong to package main. Only exporter.go turns
// errors of auth, vdi and xapi into answers to clients.
package service
