// Package neterr classifies the errors of a network connection, for the server and for the
// client. It does not depend on the NBD protocol.
package neterr
