// Package check looks at everything that the service needs on a host, and says what is
// wrong and what to do about it. It changes nothing and takes no lock.
//
// It reads settings, inventory, journal and tags with the parsers of the service (packages
// config and vdi), and does not know the service itself: a running one is found by its
// sockets and its lock.
package check
