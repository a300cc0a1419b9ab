// Package check inspects everything that the service needs on a host, and reports each
// fault with a remedy. It changes nothing and takes no lock.
//
// It reads settings, inventory, journal and tags with the parsers of the service (packages
// config and vdi). It does not import the service: it finds a running one by its sockets
// and its lock.
package check
