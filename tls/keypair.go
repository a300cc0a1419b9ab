package tls

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	cryptotls "crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
)

// maxFileSize bounds the size of the certificate file, which is read when a peer connects.
// A 4096-bit key with a chain of ten certificates has about 25 KiB.
const maxFileSize = 1 << 20

// minRSABits is the minimum with which crypto/rsa signs. A smaller key would load and then
// fail every handshake, and only the peer would see the reason.
const minRSABits = 1024

// Defects of a certificate file. They are not exported because callers only print them.
var (
	errNotRegular    = errors.New("not a regular file")
	errTooLarge      = fmt.Errorf("larger than %d bytes", maxFileSize)
	errEmpty         = errors.New("the file is empty")
	errNoPEM         = errors.New("the file holds no PEM block")
	errDamaged       = errors.New("damaged or truncated PEM block")
	errNoKey         = errors.New("the file holds no private key")
	errEncryptedKey  = errors.New("the private key is encrypted; a service cannot ask for a passphrase")
	errBadKey        = errors.New("the private key cannot be parsed")
	errWeakKey       = fmt.Errorf("the RSA key has fewer than %d bits", minRSABits)
	errNoCertificate = errors.New("the file holds no certificate")
	errBadCert       = errors.New("cannot be parsed")
	errMismatch      = errors.New("the private key does not belong to the first certificate")
)

// LoadKeyPair reads a private key and its certificate chain from one PEM file, as xapi
// writes it: the key, then the leaf, then the rest of the chain.
//
// The key may be PKCS#8, PKCS#1 ("RSA PRIVATE KEY") or SEC 1 ("EC PRIVATE KEY").
// Other blocks (files from older releases carry DH PARAMETERS), CRLF line ends
// and text between the blocks are skipped. The first certificate is the leaf.
//
// Key and leaf must be valid and belong together. The certificates after the leaf are sent
// as they are, even if crypto/x509 refuses them, for example for a negative serial number:
// clients verify them. One that does not have the structure of a certificate is left out,
// and leftOut has an error with its number and the reason.
//
// An expired certificate loads: the client decides, and may have pinned this leaf. Errors
// never quote the file; err contains the path.
func LoadKeyPair(path string) (cert *cryptotls.Certificate, leftOut []error, err error) {
	data, _, err := readFile(path)
	if err != nil {
		return nil, nil, err
	}
	return parseFile(path, data)
}

// readFile returns the file's content and its fstat before the read, so that the next call
// notices a replacement during the read.
func readFile(path string) ([]byte, fs.FileInfo, error) {
	// Before the open, because opening a FIFO waits for a writer.
	fi, err := os.Stat(path)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate: %w", err)
	}
	if !fi.Mode().IsRegular() {
		return nil, fi, fmt.Errorf("certificate %s: %w", path, errNotRegular)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fi, fmt.Errorf("certificate: %w", err)
	}
	defer f.Close()
	opened, err := f.Stat()
	if err != nil {
		return nil, fi, fmt.Errorf("certificate: %w", err)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFileSize+1))
	if err != nil {
		return nil, opened, fmt.Errorf("certificate: %w", err)
	}
	return data, opened, nil
}

// parseFile calls parse and adds the path to its errors.
func parseFile(path string, data []byte) (*cryptotls.Certificate, []error, error) {
	cert, leftOut, err := parse(data)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate %s: %w", path, err)
	}
	return cert, leftOut, nil
}

// parse implements LoadKeyPair for the content of a file.
func parse(data []byte) (cert *cryptotls.Certificate, leftOut []error, err error) {
	switch {
	case len(data) > maxFileSize:
		return nil, nil, errTooLarge
	case len(bytes.TrimSpace(data)) == 0:
		return nil, nil, errEmpty
	}
	blocks := decode(data)
	if len(blocks) == 0 {
		return nil, nil, errNoPEM
	}
	key, err := privateKey(blocks)
	if err != nil {
		return nil, nil, err
	}
	cert = &cryptotls.Certificate{PrivateKey: key}
	number := 0
	for _, b := range blocks {
		if b.Type != "CERTIFICATE" {
			continue
		}
		number++
		err := addCertificate(cert, b)
		switch {
		case err == nil:
		case errors.Is(err, errDamaged) && number == 1:
			return nil, nil, damaged(blocks)
		case number == 1:
			return nil, nil, fmt.Errorf("certificate 1 %w", err)
		default:
			leftOut = append(leftOut, fmt.Errorf("certificate %d: %w", number, err))
		}
	}
	if cert.Leaf == nil {
		return nil, nil, errNoCertificate
	}
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(cert.Leaf.PublicKey) {
		return nil, nil, errMismatch
	}
	return cert, leftOut, nil
}

// addCertificate appends a block to the chain. The first one is the leaf and must parse.
func addCertificate(cert *cryptotls.Certificate, b block) error {
	if b.damaged {
		return errDamaged
	}
	if cert.Leaf == nil {
		leaf, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return fmt.Errorf("%w: %w", errBadCert, err)
		}
		cert.Leaf = leaf
	} else if !isCertificate(b.Bytes) {
		return errBadCert
	}
	cert.Certificate = append(cert.Certificate, b.Bytes)
	return nil
}

// isCertificate reports whether der has the outer structure of a certificate (RFC 5280,
// section 4.1) and no bytes after it. A client can skip any such certificate.
func isCertificate(der []byte) bool {
	var outline struct {
		TBSCertificate     asn1.RawValue
		SignatureAlgorithm pkix.AlgorithmIdentifier
		SignatureValue     asn1.BitString
	}
	rest, err := asn1.Unmarshal(der, &outline)
	return err == nil && len(rest) == 0 && outline.TBSCertificate.Tag == asn1.TagSequence
}

// block is a PEM block.
type block struct {
	pem.Block
	damaged bool // only the type is known
}

// decode returns all PEM blocks in order. encoding/pem skips a block that it cannot decode,
// which would hide the damage, so each block is decoded separately.
func decode(data []byte) (blocks []block) {
	const begin = "-----BEGIN "
	var segments [][]byte // each from a begin line to the next one
	at := 0
	for line := range bytes.Lines(data) {
		if bytes.HasPrefix(line, []byte(begin)) {
			segments = append(segments, data[at:at])
		}
		at += len(line)
		if n := len(segments); n > 0 {
			segments[n-1] = segments[n-1][:len(segments[n-1])+len(line)]
		}
	}
	for _, segment := range segments {
		if b, _ := pem.Decode(segment); b != nil {
			blocks = append(blocks, block{Block: *b})
			continue
		}
		kind, _, _ := strings.Cut(strings.TrimPrefix(string(segment), begin), "-----")
		blocks = append(blocks, block{Block: pem.Block{Type: kind}, damaged: true})
	}
	return blocks
}

// damaged returns an error if the block of the key or of the leaf is damaged.
func damaged(blocks []block) error {
	whole := 0
	for _, b := range blocks {
		if !b.damaged {
			whole++
		}
	}
	return fmt.Errorf("the file holds a %w (%d of %d are whole)", errDamaged, whole, len(blocks))
}

// privateKey parses the first private key block. The parser's error is dropped on purpose:
// its text quotes lengths and tags that were read from the key.
func privateKey(blocks []block) (crypto.Signer, error) {
	for _, b := range blocks {
		var key any
		var err error
		if b.damaged && strings.HasSuffix(b.Type, "PRIVATE KEY") {
			return nil, damaged(blocks)
		}
		switch b.Type {
		case "ENCRYPTED PRIVATE KEY":
			return nil, errEncryptedKey
		case "PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY":
			// RFC 1421, "Proc-Type Field": OpenSSL's mark of a key that is encrypted in the
			// traditional format.
			if strings.Contains(b.Headers["Proc-Type"], "ENCRYPTED") {
				return nil, errEncryptedKey
			}
			key, err = parseKey(&b.Block)
		default:
			continue
		}
		if err != nil {
			return nil, errBadKey
		}
		signer, ok := key.(crypto.Signer)
		if !ok { // X25519 in PKCS#8: a key, but not one that signs
			return nil, errBadKey
		}
		if r, ok := key.(*rsa.PrivateKey); ok && r.N.BitLen() < minRSABits {
			return nil, errWeakKey
		}
		return signer, nil
	}
	return nil, errNoKey
}

func parseKey(b *pem.Block) (any, error) {
	switch b.Type {
	case "RSA PRIVATE KEY":
		return x509.ParsePKCS1PrivateKey(b.Bytes)
	case "EC PRIVATE KEY":
		return x509.ParseECPrivateKey(b.Bytes)
	default:
		return x509.ParsePKCS8PrivateKey(b.Bytes)
	}
}
