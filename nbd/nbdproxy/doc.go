// Package nbdproxy serves an export of another NBD server: [New] returns a device for
// package nbd that uses a connection of package nbd/client. It is the only package, besides
// tests, that imports both the server and the client.
package nbdproxy
