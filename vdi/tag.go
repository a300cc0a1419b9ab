package vdi

import (
	"crypto/rand"
	"strings"
)

// tagKey is the key in a VBD's other_config that marks it as made by this
// service on one host. Its value is the host's INSTALLATION_UUID, the nonce of the
// attempt, and the owner, with blanks between them. The key needs no escaping
// anywhere in xapi.
const tagKey = "xapi-nbd"

// generation is the first part of an owner. There is one process per host and so
// one generation of owners; when a process can hand its VBDs to its successor, the
// number will tell the two apart.
const generation = "1"

// newOwner names a process. Whoever holds the lock of a host (see hostLock) is
// the only owner that is alive there.
func newOwner() string { return generation + "." + rand.Text() }

func newTag(installation, nonce, owner string) map[string]string {
	return map[string]string{tagKey: installation + " " + nonce + " " + owner}
}

// tag is what the tag of a VBD says.
type tag struct {
	installation string
	nonce        string
	owner        string // "" in tags of version 0.1
}

// readTag reads a VBD's tag; ok is false when there is none that this service made.
func readTag(otherConfig map[string]string) (t tag, ok bool) {
	parts := strings.Split(otherConfig[tagKey], " ")
	if len(parts) < 2 || parts[0] == "" || parts[1] == "" {
		return tag{}, false
	}
	t = tag{installation: parts[0], nonce: parts[1]}
	if len(parts) > 2 {
		t.owner = parts[2]
	}
	return t, true
}
