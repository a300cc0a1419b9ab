// Package tls gives the NBD server its certificate and its TLS policy.
//
// xapi keeps the host's identity in one PEM file, private key first, then the
// leaf and optionally its chain, and replaces it by rename whenever the
// certificate is installed, reset or refreshed (host.install_server_certificate,
// host.reset_server_certificate). Nothing tells the NBD service about it, while
// VDI.get_nbd_info hands the new leaf to clients at once, so the file is looked
// at for every handshake: see [Reloader].
//
// Errors and log lines name the file and the defect, never a byte of the key.
//
// Not supported: encrypted keys, client certificates, TLS below 1.2.
//
// Next to crypto/tls this package is imported as nbdtls.
package tls
