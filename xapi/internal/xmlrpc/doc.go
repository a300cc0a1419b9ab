// Package xmlrpc encodes Xen API calls as XML-RPC and decodes the replies.
//
// It is the only package that imports github.com/kolo/xmlrpc, and uses only its codec:
// kolo's client serialises its calls, has no contexts and no limits, and stops for good
// after one malformed reply. To replace kolo only this directory has to change.
//
// # Faults of kolo
//
// Encode checks every argument first, because kolo neither escapes nor refuses map keys and
// method names, replaces characters that XML does not allow, and encodes nil, []byte,
// integers and times as elements that xapi rejects.
//
// Decode first repairs known faults of xapi (see repair), such as map keys that are not
// escaped, so that one odd key does not make a reply unreadable. Then it rewrites the reply
// into a form that kolo decodes without loss (see normalise). Without that kolo trims
// untyped text, loses every struct member and array element after an empty <value/>, rejects
// a reply with an empty member name, and does not limit nesting. Its fault detection, a
// regular expression over the whole body, is not used: the envelope is parsed.
//
// # Changes to values
//
// XML turns CR LF and CR into LF, and xapi drops other control characters from values before
// sending; neither matters for refs, uuids, device names and error codes. Characters that
// XML does not allow become U+FFFD. White space inside a value is kept. A map entry with an
// empty key is dropped. The type elements of numbers and dates are dropped: they are decoded
// as strings, the form in which xapi sends them anyway.
package xmlrpc
