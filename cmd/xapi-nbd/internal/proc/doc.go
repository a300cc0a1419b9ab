// Package proc finds out about other processes of this host from /proc and from sockets:
// which process listens, or holds a lock.
//
// It does not know the service.
package proc
