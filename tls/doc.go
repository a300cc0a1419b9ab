// Package tls gives the NBD server its certificate and its TLS policy.
//
// xapi keeps the host's identity in one PEM file, private key first, then the leaf and
// optionally its chain, and replaces it by rename when the certificate is installed, reset
// or refreshed (host.install_server_certificate, host.reset_server_certificate). The NBD
// service gets no notice, while VDI.get_nbd_info returns the new leaf to clients at once,
// so the file is checked at every handshake: see [Reloader].
//
// Errors and log lines name the file and the defect, and quote nothing of the key.
//
// Not supported: encrypted keys, client certificates, TLS below 1.2.
//
// Next to crypto/tls this package is imported as nbdtls.
package tls
