package vdi

import "strings"

// tagKey is the key in a VBD's other_config that marks the VBD as created by this service.
// The value is the host's INSTALLATION_UUID, the nonce of the attachment, and the owner,
// which names the process (see generations), separated by blanks. The key needs no escaping
// anywhere in xapi.
const tagKey = "xapi-nbd"

func newTag(installation, nonce, owner string) map[string]string {
	return map[string]string{tagKey: installation + " " + nonce + " " + owner}
}

// tag is the parsed tag of a VBD.
type tag struct {
	installation string
	nonce        string
	owner        string // "" in tags of version 0.1
}

// readTag reads the tag from a VBD's other_config. ok is false without a valid tag.
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

// TaggedHost returns the INSTALLATION_UUID in the tag of a VBD of this service; ok is false
// for other VBDs.
func TaggedHost(otherConfig map[string]string) (installation string, ok bool) {
	t, ok := readTag(otherConfig)
	return t.installation, ok
}
