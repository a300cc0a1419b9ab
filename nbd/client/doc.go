// Package client is a client of the NBD protocol over any [net.Conn], with or without
// TLS.
//
// [ParseURI] reads a URI such as nbds://host/export. [Dial] connects and begins the
// handshake; the [Client] that it returns can list exports ([Client.List]), describe one
// ([Client.Info]) and open one ([Client.Go]). An open export is a [Conn], which reads,
// writes and maps it, with as many requests in flight as there are concurrent calls. A
// [Pool] does so over several connections, makes lost ones again and repeats their requests.
//
// Copying and comparing are left to the caller. The package depends neither on
// Xen nor on the server of package nbd; package nbdproxy makes a device for that server
// of a Conn.
//
// It trusts nothing that a server sends. Lengths are limited, memory is allocated as data
// arrives and not for announced lengths, and a reply that violates the protocol ends the
// connection with an error. Texts from servers are stripped of control characters.
package client
