package vdi

import "strings"

// tagKey is the key in a VBD's other_config that marks it as made by this
// service on one host. Its value is the host's INSTALLATION_UUID, a blank, and
// the nonce of the attempt. The key needs no escaping anywhere in xapi.
const tagKey = "xapi-nbd"

func newTag(installation, nonce string) map[string]string {
	return map[string]string{tagKey: installation + " " + nonce}
}

// nonceOf returns the nonce of a VBD that this service made on this host; ok is
// false for everybody else's.
func nonceOf(otherConfig map[string]string, installation string) (nonce string, ok bool) {
	value, tagged := otherConfig[tagKey]
	if !tagged {
		return "", false
	}
	host, nonce, _ := strings.Cut(value, " ")
	return nonce, host == installation && nonce != ""
}
