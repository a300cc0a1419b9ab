// Package xmlrpc turns Xen API calls into XML-RPC text and back.
//
// It is the only package that imports github.com/kolo/xmlrpc, and it uses that
// library's codec functions only: kolo's client serialises its calls, has no
// context and no limits, and one odd reply shuts it down for good. Replacing
// kolo means rewriting this directory and nothing else.
//
// # What kolo gets wrong, and what is done about it
//
// Encode checks every argument first, because kolo neither escapes nor refuses
// map keys and method names, replaces characters that XML cannot carry, and
// turns nil, []byte, integers and times into elements that xapi rejects.
//
// Decode first repairs what xapi itself writes wrongly (see repair), such as map
// keys that are not escaped: one odd key must not spoil a reply about others. Then
// it rewrites the reply into the dialect that kolo reads faithfully (see
// normalise) before kolo sees it. Left alone, kolo trims untyped text, loses
// every struct member and array element that follows an empty <value/>, rejects
// an empty member name together with the whole reply, and puts no limit on
// nesting. Its fault detection is a regular expression over the whole body; it
// is not used, the envelope is parsed.
//
// # What is lost on the way
//
// XML itself turns CR LF and CR into LF, and xapi drops other control
// characters from values before sending; neither matters for refs, uuids, device
// names and error codes. What XML cannot carry becomes U+FFFD. White space inside a value is kept. A map entry whose key is
// empty is dropped. The type elements of numbers and dates are dropped: they
// arrive as strings, as they do from xapi anyway.
package xmlrpc
